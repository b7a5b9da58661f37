"""Knights and knaves: puzzles with exactly one solution, with a generator and a checker.

Every person is a knight (whatever they say is true) or a knave (whatever they say is false). A
statement is one claim about a person or two claims joined by and / or / if-then / if and only if. A
world (who is a knight) solves the puzzle when every speaker's role equals the truth of their
statement.

The puzzles are those of Logic-RL (arXiv 2502.14768) and of reasoning-gym's `knights_knaves`. The
code is independent of both, so that the default needs no compiled dependency and splits by
*structure* (`structure_key`).
"""

import hashlib
import itertools
import operator
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

from rlad.config.task import KnightsAndKnavesConfig
from rlad.tasks.answers import marked_answer
from rlad.tasks.base import (
    SPLITS,
    UNIT_RANGE,
    Judgement,
    Problem,
    Split,
    Task,
    judged,
    split_of,
    with_feedback,
)
from rlad.tasks.denials import is_taken_back

NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivy", "Jack", "Kim", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tess", "Uma", "Vera", "Will", "Zoe",
)  # fmt: skip
ROLES = {True: "knight", False: "knave"}

Connective = Literal["is", "and", "or", "if", "iff"]
World = tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim that `person` (an index) is a knight, or is a knave."""

    person: int
    is_knight: bool


JOINED: dict[Connective, tuple[str, Callable[[bool, bool], bool]]] = {
    "and": ("{} and {}", operator.and_),
    "or": ("{} or {}", operator.or_),
    "if": ("if {} then {}", operator.le),
    "iff": ("{} if and only if {}", operator.eq),
}
"""The English text of each connective of two claims, and when it holds."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A claim (`is`) or two claims joined by a connective."""

    connective: Connective
    claims: tuple[Claim, ...]

    def holds(self, world: World) -> bool:
        truths = [world[claim.person] == claim.is_knight for claim in self.claims]
        return truths[0] if self.connective == "is" else JOINED[self.connective][1](*truths)


Puzzle = tuple[Statement, ...]  # statement i is made by person i


def solutions(puzzle: Puzzle) -> list[World]:
    """List the worlds in which every speaker is a knight exactly when their statement holds."""
    worlds = itertools.product((True, False), repeat=len(puzzle))
    return [w for w in worlds if all(w[i] == s.holds(w) for i, s in enumerate(puzzle))]


def random_puzzle(num_people: int, rng: random.Random) -> Puzzle:
    """Draw a puzzle uniformly among those with exactly one solution (by rejection)."""
    # Rejection: every puzzle with one solution stays as likely as any other.
    while True:
        puzzle = random_statements(num_people, rng)
        if len(solutions(puzzle)) == 1:
            return puzzle


def random_statements(num_people: int, rng: random.Random) -> Puzzle:
    """Draw a puzzle that may have any number of solutions."""

    def claim(person: int) -> Claim:
        return Claim(person, rng.random() < 0.5)

    def statement(speaker: int) -> Statement:
        connective: Connective = rng.choice(("is", *JOINED))
        if connective == "is":
            others = [p for p in range(num_people) if p != speaker]
            return Statement("is", (claim(rng.choice(others)),))
        first, second = rng.sample(range(num_people), 2)
        return Statement(connective, (claim(first), claim(second)))

    return tuple(statement(speaker) for speaker in range(num_people))


def structure_key(puzzle: Puzzle) -> str:
    """Hash a puzzle. Puzzles that differ only in names and the order of people have the same hash.

    The method is colour refinement (Weisfeiler-Leman): in each round a person's colour is hashed
    from their own statement, with the people in it replaced by their colours. Different structures
    rarely collide, which only puts them into the same split. The order of the claims of and / or /
    iff does not matter.
    """

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # In each round a person's new colour includes what they say (claims with the colours of the
    # people in them) and what is said about them. After as many rounds as there are people, further
    # rounds distinguish no more of them. Sorting makes both independent of the order of people.
    # Only in "if A then B" does the order of the claims matter.
    colours = ["?"] * len(puzzle)
    for _ in range(len(puzzle) + 1):
        heard: list[list[str]] = [[] for _ in puzzle]
        said = []
        for speaker, statement in enumerate(puzzle):
            claims = [
                f"{colours[c.person]}{c.person == speaker}{c.is_knight}" for c in statement.claims
            ]
            ordered = claims if statement.connective == "if" else sorted(claims)
            said.append(f"{statement.connective}({','.join(ordered)})")
            for position, c in enumerate(statement.claims):
                place = position if statement.connective == "if" else 0
                heard[c.person].append(
                    f"{colours[speaker]}{statement.connective}{place}{c.is_knight}"
                )
        colours = [digest(f"{colours[i]}|{said[i]}|{sorted(heard[i])}") for i in range(len(puzzle))]
    return digest("|".join(sorted(colours)))


def statement_text(statement: Statement, names: Sequence[str]) -> str:
    """Write the statement in English, for example `if Ada is a knave then Ben is a knight`."""
    parts = [f"{names[c.person]} is a {ROLES[c.is_knight]}" for c in statement.claims]
    return (
        parts[0] if statement.connective == "is" else JOINED[statement.connective][0].format(*parts)
    )


def answer_text(world: World, names: Sequence[str]) -> str:
    """Write the expected answer, for example `Ada is a knight, Ben is a knave`."""
    return ", ".join(f"{name} is a {ROLES[role]}" for name, role in zip(names, world, strict=True))


def prompt_text(puzzle: Puzzle, names: Sequence[str]) -> str:
    """Write the puzzle in English."""
    people = ", ".join(names[:-1]) + f" and {names[-1]}"
    said = " ".join(
        f"{n} says that {statement_text(s, names)}." for n, s in zip(names, puzzle, strict=True)
    )
    return f"You meet {people}. {said} Who is a knight and who is a knave?\n"


_RULES = (
    "On an island every person is either a knight, who only says true things, or a knave, who only "
    "says false things. "
)
_INSTRUCTIONS = {
    "exact": (
        f"{_RULES}Reason step by step, then write a last line that begins with 'Answer:' and names "
        "the role of every person, for example 'Answer: Ada is a knight, Ben is a knave.'\n"
    ),
    "logic_rl": (
        f"{_RULES}First think about the puzzle between <think> and </think>, then name the role of "
        "every person between <answer> and </answer>, for example '<think> your reasoning "
        "</think><answer> Ada is a knight, Ben is a knave </answer>'.\n"
    ),
}
"""instructions before a puzzle, by reward"""
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# All that an answer may contain: roles, neutral words between them, and the marks of lists and
# LaTeX. "Ada is a knight or a knave" and "if Ada is a knight" have other words.
_PIECE = re.compile(
    r"\b(?P<name>\w+)\s+is\s+an?\s+(?P<role>knight|knave)\b"
    r"|\b(?P<begun>\w+)\s+is\s+an?\b\W*(?=(?P=begun)\b)"  # Ada is a: Ada is a knight
    r"|\b(?:and|so|therefore|thus|hence|while|whereas|but|the|final|answer|solution|roles?|are|is"
    r"|that|as|follows|we|have)\b"
    r"|(?<!\w)[0-9]{1,2}[.)]|\\(?:boxed|text|textbf|mathrm)(?![a-z])|\\[\\()\[\],;! ]"
    "|[\\s.,;:()\\[\\]{}$&'\"\N{BULLET}\N{LEFT DOUBLE QUOTATION MARK}"
    "\N{RIGHT DOUBLE QUOTATION MARK}\N{EN DASH}\N{EM DASH}-]|!(?!\\w)"
)
_MARKDOWN = str.maketrans("", "", "*_`#")


def parse_answer(completion: str) -> dict[str, bool] | None:
    """Read roles, by lower-case name, in the last `<answer>` tag or after the last `Answer:`.

    Return None if there is neither, if the answer names nobody, gives one person both roles, or has
    other text than roles. Further lines may follow, unless they take the answer back.
    """
    answer = (marked_answer(completion) or "").translate(_MARKDOWN)
    # In lower case, as a pattern that ignores case would also match "knıght".
    text = "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in answer)
    roles: dict[str, bool] = {}
    at = end_of_roles = 0
    while piece := _PIECE.match(text, at):
        at = piece.end()
        if piece["role"]:
            end_of_roles = at
            is_knight = piece["role"] == "knight"
            if roles.setdefault(piece["name"], is_knight) != is_knight:
                return None
    if at < len(text):
        _, _, remarks = answer[end_of_roles:].partition("\n")
        # A line that begins in lower case continues the sentence of the roles.
        is_remark = "\n" in text[end_of_roles:at] and not remarks.lstrip()[:1].islower()
        if not is_remark or is_taken_back(remarks):
            return None
    return roles or None


class KnightsAndKnaves(Task):
    """The task of puzzles with `num_people` people (2 to 8; several sizes take turns), split by
    structure.

    A completion is correct if its answer gives every person of the puzzle the right role and names
    nobody else. `reward="logic_rl"` is the rule of Logic-RL (arXiv 2502.14768), see
    `logic_rl_reward`. The settings are those of `KnightsAndKnavesConfig`.
    """

    name = "knights_and_knaves"

    def __init__(self, **settings: Any) -> None:
        self._settings = KnightsAndKnavesConfig(**settings)
        self.reward_range = UNIT_RANGE if self._settings.reward == "exact" else (-3.0, 3.0)

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        assert split in SPLITS, "draws would never end"
        rng = random.Random(f"{seed}/{split}/{index}")
        settings = self._settings
        size = settings.num_people[index % len(settings.num_people)]
        # The structure decides the split, so a draw in another split is discarded.
        while True:  # ends: every size has structures in every split
            puzzle = random_puzzle(size, rng)
            key = structure_key(puzzle)
            if split_of(key) == split:
                break
        names = rng.sample(NAMES, size) if settings.vary_names else list(NAMES[:size])
        (world,) = solutions(puzzle)
        instructions = _INSTRUCTIONS[settings.reward] if settings.instructions else ""
        return Problem(
            prompt=instructions + prompt_text(puzzle, names),
            answer=answer_text(world, names),
            key=key,
            difficulty=f"{size} people",
            metadata={
                "names": names,
                "world": list(world),
                "num_people": size,
                "statements": [astuple(statement) for statement in puzzle],
            },
        )

    def judge(self, problem: Problem, completion: str) -> Judgement:
        people = zip(problem.metadata["names"], problem.metadata["world"], strict=True)
        wanted = {name.lower(): is_knight for name, is_knight in people}
        roles = parse_answer(completion)
        judgement = judged(roles == wanted)
        if self._settings.reward == "logic_rl":
            judgement = replace(judgement, reward=logic_rl_reward(completion, wanted))
        if "statements" not in problem.metadata:  # a problem that was made elsewhere
            return judgement
        names = problem.metadata["names"]
        return with_feedback(judgement, what_is_wrong(puzzle_of(problem), names, roles))


def puzzle_of(problem: Problem) -> Puzzle:
    """Return the statements of a problem from its metadata, where they are lists as in JSON."""
    return tuple(
        Statement(connective, tuple(Claim(*claim) for claim in claims))
        for connective, claims in problem.metadata["statements"]
    )


def what_is_wrong(puzzle: Puzzle, names: Sequence[str], roles: dict[str, bool] | None) -> str:
    """Say what is wrong with an answer (roles by lower-case name), without giving the right one;
    empty for the right answer."""
    if roles is None:
        return "No answer could be read: each person needs one role, after 'Answer:'."
    missing = [name for name in names if name.lower() not in roles]
    if missing:
        return f"The answer gives {missing[0]} no role."
    if len(roles) > len(names):
        return "The answer names somebody who is not in the puzzle."
    # The puzzle has one solution, so in any other world some role and statement contradict.
    world = tuple(roles[name.lower()] for name in names)
    for name, role, statement in zip(names, world, puzzle, strict=True):
        if statement.holds(world) != role:
            truth = "true" if statement.holds(world) else "false"
            return (
                f"By this answer {name} is a {ROLES[role]}, but what {name} says would then be "
                f"{truth}."
            )
    return ""


def logic_rl_reward(completion: str, wanted: dict[str, bool]) -> float:
    """Return the sum of the rewards for the format (+1 or -1) and the answer (+2 if right, -1.5 if
    wrong, -2 if roles are missing or cannot be read), from -3 to 3.

    The format is right if `<think>`, `</think>`, `<answer>` and `</answer>` occur once each, in
    this order; `<think>` may be missing, as chat templates write it at the end of the prompt. As in
    Logic-RL's code, the answer is not read if the format is wrong.
    """
    # The format is one thought, then one answer. A second answer could be a guess.
    tags = _TAGS if _TAGS[0] in completion else _TAGS[1:]
    positions = [completion.find(tag) for tag in tags]
    if any(completion.count(tag) != 1 for tag in tags) or positions != sorted(positions):
        return -1.0 - 2.0
    roles = parse_answer(completion)
    if roles is None or roles.keys() != wanted.keys():
        return 1.0 - 2.0
    return 1.0 + (2.0 if roles == wanted else -1.5)
