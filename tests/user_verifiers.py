"""Verifiers as users write them, good and bad; loaded by name in the worker process."""

import os
import signal
import sys
import time

from rlad.tasks import Verdict

CALLS = {
    "equal": lambda completion, answer: completion.strip() == answer,
    "half": lambda completion, answer: 0.5,
    "one": lambda completion, answer: 1,
    "three parts": lambda completion, answer: 0.7 + 0.2 + 0.1,
    "ten parts": lambda completion, answer: sum([0.1] * 10),
    "a little more": lambda completion, answer: 0.2 + 0.4 + 0.3 + 0.1,
    "a little less than nothing": lambda completion, answer: 0.3 - 0.2 - 0.1 - 1e-12,
    "nearly": lambda completion, answer: 0.999999,
    "too much": lambda completion, answer: 1.000001,
    "verdict": lambda completion, answer: Verdict.CORRECT,
    "no verdict": lambda completion, answer: Verdict.CANNOT_JUDGE,
    "hang": lambda completion, answer: time.sleep(600),
    "raise": lambda completion, answer: {}["no such key"],
    "die": lambda completion, answer: os._exit(3),
    "die quietly": lambda completion, answer: os._exit(0),
    "segfault": lambda completion, answer: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda completion, answer: sys.exit("enough"),
    "interrupt": lambda completion, answer: signal.raise_signal(signal.SIGINT) or interrupt(),
    "nothing": lambda completion, answer: None,
    "text": lambda completion, answer: "correct?",
    "seven": lambda completion, answer: 7,
    "nan": lambda completion, answer: float("nan"),
    "not picklable": lambda completion, answer: lambda: None,
    "bad repr": lambda completion, answer: BadRepr(),
    "eat": lambda completion, answer: len([bytearray(2**24) for _ in range(2**20)]),
}


class BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def interrupt() -> None:
    raise KeyboardInterrupt


def by_completion(completion: str, answer: str) -> object:
    """Does what the completion says, so that one process meets every kind of trouble in turn."""
    return CALLS.get(completion, CALLS["equal"])(completion, answer)


def trouble_with_words(completion: str, answer: str) -> object:
    """Gets into trouble with completions of several words, of another kind with each length."""
    words = completion.split()
    trouble = ("equal", "equal", "hang", "eat", "die", "raise")[min(len(words), 5)]
    return CALLS[trouble](completion, answer)


def last_digit(completion: str, answer: str) -> bool:
    """Correct when the last digit, wherever it is, is the answer: often, by chance."""
    digits = [character for character in completion if character.isdigit()]
    return digits[-1:] == [answer]


def one_argument(completion: str) -> bool:
    return True


def boxed_alone(completion: str, answer: str) -> bool:
    return completion == f"\\boxed{{{answer}}}"


def process_id(completion: str, answer: str) -> float:
    return os.getpid() / 2**40


not_a_function = 3
