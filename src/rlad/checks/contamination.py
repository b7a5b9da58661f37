"""Find held-out problems among the training problems by comparing runs of words, as for GPT-3
(arXiv 2005.14165, app. C).

Words are letters and digits without case. In scripts without spaces between words (Chinese,
Japanese, Thai) each letter is a word. A run of 8 words in more than 10 held-out problems is an
instruction; one in more than 10 training problems is a phrase. Instructions and phrases cut a
held-out problem into the parts between them. A problem is found if

- 13 words in a row of a part (the whole part, if it has 8 to 12 words) are in a training problem,
- four fifths of its words outside of the instructions are in training problems, or
- its key is that of a training problem.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rlad.tasks.base import Problem, Split, Task
from rlad.tasks.conversations import asked_text
from rlad.tasks.several import SeveralTasks

RUN_WORDS = 13
FEWEST_WORDS = 8
MOST_PROBLEMS = 10
MOST_WORDS = 0.8
# Thai, Lao, Tibetan, Burmese; Khmer; kana; Han.
_UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+|[^\W_]")
Parts = list[list[str]]


@dataclass(frozen=True, slots=True)
class Contamination:
    """How many held-out problems were found among how many training problems, and one of them."""

    num_held_out: int
    num_found: int
    num_train: int
    num_same: int
    """number of those found that equal a training problem, not only resemble one"""
    example: str
    """words that a held-out problem shares with a training problem; empty if none was found"""
    has_phrases: bool
    """whether held-out and training problems share instructions or phrases, which do not count by
    themselves"""


def words(text: str) -> list[str]:
    """Split a text into words, ignoring compatibility forms and case."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def find_contamination(train: Iterable[Problem], held_out: Iterable[Problem]) -> Contamination:
    """Find the held-out problems that are among the training problems. Equal problems count
    once."""
    # Runs of words that are in many problems, and so do not identify one of them.
    trained = {problem.key: problem for problem in train}
    texts = {problem.key: _words_of(problem) for problem in held_out}
    in_held_out = Counter(run for text in texts.values() for run in set(_runs(text, FEWEST_WORDS)))
    in_trained: Counter[str] = Counter()
    for problem in trained.values():
        in_trained.update(in_held_out.keys() & set(_runs(_words_of(problem), FEWEST_WORDS)))
    instructions = _frequent(in_held_out)
    phrases = instructions | _frequent(in_trained)
    # Held-out problems, cut at the instructions, and also at the phrases.
    whole = {key: list(_parts(text, instructions)) for key, text in texts.items()}
    distinct = {key: list(_parts(text, phrases)) for key, text in texts.items()}
    # Search the training problems only for runs that occur in held-out problems.
    wanted = {
        run
        for parts in (*whole.values(), *distinct.values())
        for part in parts
        for run in _longest_runs(part)
    }
    sizes = {run.count(" ") + 1 for run in wanted}
    shared: set[str] = set()
    for problem in trained.values():
        text = _words_of(problem)
        for size in sizes:
            shared |= wanted.intersection(_runs(text, size))
    # A problem is found by its key or by its decisive runs.
    decisive = {key: _decisive(distinct[key], whole[key], shared) for key in texts}
    same = texts.keys() & trained.keys()
    found = same | {key for key, runs in decisive.items() if runs}
    example = min((run for runs in decisive.values() for run in runs), default="")
    example = example or next((" ".join(texts[key]) for key in sorted(same)), "")
    has_phrases = not phrases.isdisjoint(in_trained)
    return Contamination(len(texts), len(found), len(trained), len(same), example, has_phrases)


def _words_of(problem: Problem) -> list[str]:
    return words(asked_text(problem.messages) or problem.prompt)


def _frequent(counts: Counter[str]) -> set[str]:
    return {run for run, number in counts.items() if number > MOST_PROBLEMS}


def _parts(text: list[str], phrases: set[str]) -> Iterator[list[str]]:
    """Yield the parts between the phrases that have at least 8 words."""
    starts = [i for i, run in enumerate(_runs(text, FEWEST_WORDS)) if run in phrases]
    inside = {position for start in starts for position in range(start, start + FEWEST_WORDS)}
    for is_inside, positions in groupby(range(len(text)), key=inside.__contains__):
        part = [text[i] for i in positions]
        if not is_inside and len(part) >= FEWEST_WORDS:
            yield part


def _decisive(distinct: Parts, whole: Parts, shared: set[str]) -> list[str]:
    """Return the shared runs that show that a problem is in training problems; none if it is not.

    `distinct` are its parts between instructions and phrases, `whole` those between instructions
    only.
    """
    # One run that is not a phrase is enough.
    runs = [run for part in distinct for run in _longest_runs(part) if run in shared]
    if runs:
        return runs
    # Otherwise shared runs must cover nearly all positions of its words.
    inside = [
        {
            start + i
            for start, run in enumerate(_longest_runs(part))
            if run in shared
            for i in range(min(len(part), RUN_WORDS))
        }
        for part in whole
    ]
    if sum(map(len, inside)) < MOST_WORDS * sum(map(len, whole)):
        return []
    return [run for part in whole for run in _longest_runs(part) if run in shared]


def _longest_runs(part: Sequence[str]) -> Iterator[str]:
    return _runs(part, min(len(part), RUN_WORDS))


def _runs(text: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(text[i : i + size]) for i in range(len(text) - size + 1))


def finite_problems(
    task: Task, split: Split, most: int | None = None, *, seed: int = 0
) -> Iterator[Problem]:
    """Yield the first problems of a split, at most `most`, for each of several tasks. A task that
    generates problems yields none, since it makes disjoint splits itself.
    """
    for one in task.tasks.values() if isinstance(task, SeveralTasks) else (task,):
        number = one.num_problems(split) or 0
        yield from (
            one.problem(split, i, seed=seed)
            for i in range(number if most is None else min(number, most))
        )
