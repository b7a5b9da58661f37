"""Are held-out problems among the training problems? Compared by runs of words, as for GPT-3 (arXiv
2005.14165, app. C).

Words are letters and digits without case; of scripts without spaces between words (Chinese,
Japanese, Thai) each letter is one. A run of 8 words that is in more than 10 held-out problems is
an instruction, one that is in more than 10 training problems a phrase. Both cut a held-out problem
into the parts between them. It is found when

- 13 words in a row of a part (of a part of 8 to 12 words all of it) are in a training problem,
- four fifths of its words outside of the instructions are, however often, or
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
    """of those found, the ones that are a training problem, not only alike"""
    example: str
    """words that a held-out problem shares with a training problem; empty when none was found"""
    has_phrases: bool
    """whether held-out and training problems share instructions or phrases, which alone do not
    count"""


def words(text: str) -> list[str]:
    """Split a text into words; compatibility forms and case do not count."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def find_contamination(train: Iterable[Problem], held_out: Iterable[Problem]) -> Contamination:
    """Find the held-out problems that are among the training problems. Equal ones count once."""
    # Which runs of words are in many problems, so that they say nothing of one of them.
    trained = {problem.key: problem for problem in train}
    texts = {problem.key: _words_of(problem) for problem in held_out}
    in_held_out = Counter(run for text in texts.values() for run in set(_runs(text, FEWEST_WORDS)))
    in_trained: Counter[str] = Counter()
    for problem in trained.values():
        in_trained.update(in_held_out.keys() & set(_runs(_words_of(problem), FEWEST_WORDS)))
    instructions = _frequent(in_held_out)
    phrases = instructions | _frequent(in_trained)
    # Held-out problems cut at the instructions, and at the phrases too.
    whole = {key: list(_parts(text, instructions)) for key, text in texts.items()}
    distinct = {key: list(_parts(text, phrases)) for key, text in texts.items()}
    # Only runs that some held-out problem has are looked for in the training problems.
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
    # A problem is found by its key or by the runs that decide it.
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
    """Yield what is between the phrases, where it has at least 8 words."""
    starts = [i for i, run in enumerate(_runs(text, FEWEST_WORDS)) if run in phrases]
    inside = {position for start in starts for position in range(start, start + FEWEST_WORDS)}
    for is_inside, positions in groupby(range(len(text)), key=inside.__contains__):
        part = [text[i] for i in positions]
        if not is_inside and len(part) >= FEWEST_WORDS:
            yield part


def _decisive(distinct: Parts, whole: Parts, shared: set[str]) -> list[str]:
    """Return the shared runs that show that a problem is in training problems; none when it is not.

    `distinct` are its parts between instructions and phrases, `whole` those between instructions
    alone.
    """
    # One run that is no phrase is enough.
    runs = [run for part in distinct for run in _longest_runs(part) if run in shared]
    if runs:
        return runs
    # Else nearly all of it must be there: the positions of words that some shared run covers.
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
    """Yield the first problems of a split, at most `most`; of several tasks those of each. A task
    that generates problems yields none: it makes its splits disjoint itself.
    """
    for one in task.tasks.values() if isinstance(task, SeveralTasks) else (task,):
        number = one.num_problems(split) or 0
        yield from (
            one.problem(split, i, seed=seed)
            for i in range(number if most is None else min(number, most))
        )
