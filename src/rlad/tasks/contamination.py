"""Do held-out problems stand among the training problems? Compared by runs of words, as for GPT-3 (arXiv 2005.14165, app. C).

Words are letters and digits without case. A run of 8 words that stands in more than 10 training problems, or in more than 10
held-out ones, is instruction or phrase, and cuts a held-out problem into the parts beside it. The problem is found when 13
words in a row of one of them stand in a training problem (of a part of 8 to 12 words all of it), and when its key is a
training problem's.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rlad.tasks.base import Problem, Split, Task
from rlad.tasks.conversations import asked_text
from rlad.tasks.several import SeveralTasks

RUN_WORDS, FEWEST_WORDS, MOST_PROBLEMS = 13, 8, 10
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Contamination:
    """How many held-out problems were found among how many training problems, and one of them."""

    num_held_out: int
    num_found: int
    num_train: int
    num_same: int
    """of those found, the ones that are a training problem, not only alike"""
    example: str
    """words that a held-out problem shares with a training problem; empty when none was found"""


def words(text: str) -> list[str]:
    """Letters and digits, compatibility forms and case aside."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def find_contamination(train: Iterable[Problem], held_out: Iterable[Problem]) -> Contamination:
    """Held-out problems that stand among the training problems. Equal problems count once."""
    trained = {problem.key: problem for problem in train}
    texts = {problem.key: _words_of(problem) for problem in held_out}
    phrases = _phrases(trained.values(), texts.values())
    wanted: dict[str, set[str]] = defaultdict(set)
    for key, text in texts.items():
        for part in _parts(text, phrases):
            for run in _runs(part, min(len(part), RUN_WORDS)):
                wanted[run].add(key)
    sizes = {run.count(" ") + 1 for run in wanted}
    runs = (run for problem in trained.values() for size in sizes for run in _runs(_words_of(problem), size))
    shared = {run for run in runs if run in wanted}
    same = texts.keys() & trained.keys()
    found = same.union(*(wanted[run] for run in shared))
    example = min(shared, default="") or next((" ".join(texts[key]) for key in sorted(same)), "")
    return Contamination(len(texts), len(found), len(trained), len(same), example)


def _words_of(problem: Problem) -> list[str]:
    return words(asked_text(problem.messages) or problem.prompt)


def _phrases(trained: Iterable[Problem], held_out: Iterable[Sequence[str]]) -> set[str]:
    """Runs of 8 words in the held-out texts that stand in more than 10 of them, or in more than 10 training problems."""
    in_held_out = Counter(run for text in held_out for run in set(_runs(text, FEWEST_WORDS)))
    texts = (_words_of(problem) for problem in trained)
    in_trained = Counter(run for text in texts for run in set(_runs(text, FEWEST_WORDS)) if run in in_held_out)
    return {run for counts in (in_held_out, in_trained) for run, number in counts.items() if number > MOST_PROBLEMS}


def _parts(text: list[str], phrases: set[str]) -> Iterator[list[str]]:
    """What stands beside the phrases, where it has at least 8 words."""
    starts = [i for i, run in enumerate(_runs(text, FEWEST_WORDS)) if run in phrases]
    inside = {position for start in starts for position in range(start, start + FEWEST_WORDS)}
    for is_inside, positions in groupby(range(len(text)), key=inside.__contains__):
        part = [text[i] for i in positions]
        if not is_inside and len(part) >= FEWEST_WORDS:
            yield part


def _runs(text: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(text[i : i + size]) for i in range(len(text) - size + 1))


def finite_problems(task: Task, split: Split, most: int | None = None, *, seed: int = 0) -> Iterator[Problem]:
    """The first problems of a split, at most `most`; of several tasks those of each. Nothing of a task that generates them:
    that makes its splits disjoint itself.
    """
    for one in task.tasks.values() if isinstance(task, SeveralTasks) else (task,):
        number = one.num_problems(split) or 0
        yield from (one.problem(split, i, seed=seed) for i in range(number if most is None else min(number, most)))
