"""Verifiers of a user, named in the configs of tiny runs and loaded in the worker process."""

import math
import os
import time
from pathlib import Path


def nan_for_long(completion: str, answer: str) -> float:
    """NaN where it must not be: the run counts it as 'cannot judge'."""
    words = completion.split()
    return math.nan if len(words) > 2 else float(words[-1:] == [answer])


def always_nan(completion: str, answer: str) -> float:
    return math.nan


def only_the_reference(completion: str, answer: str) -> float:
    """NaN for everything but the answer itself."""
    return 1.0 if completion == answer else math.nan


def hang(completion: str, answer: str) -> bool:
    """Says that it has begun, then never ends; but for the answer itself."""
    if completion != answer:
        Path(os.environ["HANGING"]).touch()
        time.sleep(600)
    return True


def slow(completion: str, answer: str) -> bool:
    """Takes two seconds while a file is there."""
    if Path(os.environ["SLOW"]).exists():
        time.sleep(2)
    return completion.split()[-1:] == [answer]
