"""Knights and knaves over several turns. The statements allow several solutions, so the model asks
questions before it answers."""

import random
import re
from collections.abc import Sequence
from typing import Any

from rlad.config.task import IslandQuestionsConfig
from rlad.tasks.answers import final_answer
from rlad.tasks.base import Problem
from rlad.tasks.episodes import Environment, Step
from rlad.tasks.games.play import GameTask
from rlad.tasks.logic import (
    NAMES,
    World,
    answer_text,
    parse_answer,
    prompt_text,
    random_statements,
    solutions,
    structure_key,
)

_QUESTION = re.compile(r"ask (\w+): is (\w+) (?:a knight|white)")
SNOW = "snow"


class IslandQuestions(GameTask):
    """The task of puzzles with several solutions, of which the replies to questions leave one. Its
    settings are those of `IslandQuestionsConfig`."""

    name = "island_questions"

    def __init__(self, **settings: Any) -> None:
        self._settings = IslandQuestionsConfig(**settings)
        super().__init__(self._settings)

    def draw(self, rng: random.Random) -> Problem | None:
        settings = self._settings
        puzzle = random_statements(settings.num_people, rng)
        worlds = solutions(puzzle)
        if len(worlds) < 2 or not can_be_settled(worlds, settings.num_questions):
            return None
        names = list(NAMES[: settings.num_people])
        if settings.vary_names:
            names = rng.sample(NAMES, settings.num_people)
        world = rng.choice(worlds)
        return Problem(
            prompt=self._instructions() + prompt_text(puzzle, names),
            answer=answer_text(world, names),
            key=structure_key(puzzle),
            difficulty=f"{len(worlds)} solutions",
            metadata={"names": names, "world": list(world)},
        )

    def make_game(self) -> Environment:
        return IslandQuestionsGame(self._settings.num_questions)

    def _instructions(self) -> str:
        if not self._settings.instructions:
            return ""
        num = self._settings.num_questions
        return (
            "On an island every person is either a knight, who only says true things, or a knave, "
            "who only says false things. What the people say does not settle who is what. You may "
            f"ask {num} question{'s' * (num > 1)}, one in each turn: 'Ask Ada: is Ben a knight?' "
            "or 'Ask Ada: is snow white?' Then write a last line that begins with 'Answer:' and "
            "names the role of every person, for example 'Answer: Ada is a knight, Ben is a "
            "knave.'\n"
        )


class IslandQuestionsGame(Environment):
    """An episode of one puzzle. The reward is 1 for an answer that gives every person the right
    role. Any answer ends the game. A turn with neither an answer nor a question uses a question."""

    def __init__(self, num_questions: int) -> None:
        self._num_questions = num_questions

    def reset(self, problem: Problem, *, seed: int) -> str:
        people = zip(problem.metadata["names"], problem.metadata["world"], strict=True)
        self._roles = {name.lower(): is_knight for name, is_knight in people}
        self._num_left = self._num_questions
        return problem.prompt

    def step(self, text: str) -> Step:
        roles = parse_answer(text)
        if roles is not None:
            is_right = roles == self._roles
            feedback = "" if is_right else "Somebody's role is wrong, or has not been named."
            return Step("", float(is_right), True, {"success": is_right, "feedback": feedback})
        if not self._num_left:
            note = "You have no question left."
            return Step(note, 0.0, True, {"success": False, "feedback": note})
        self._num_left -= 1
        return Step(f"{self._reply(final_answer(text))}\n")

    def _reply(self, text: str) -> str:
        """Write the reply of the asked person, who is a knight or a knave."""
        match = _QUESTION.search(text.lower())
        if match is None:
            return "No question could be read."
        asked, subject = match.groups()
        truths = self._roles | {SNOW: True}
        if asked not in self._roles or subject not in truths:
            return "Nobody knows that name."
        is_yes = truths[subject] == self._roles[asked]
        return f"{asked.capitalize()} says {'yes' if is_yes else 'no'}."


def can_be_settled(worlds: Sequence[World], num_questions: int) -> bool:
    """Return whether `num_questions` questions, each chosen after the earlier replies, always leave
    one of the worlds."""
    if len(worlds) == 1:
        return True
    if num_questions == 0 or len(worlds) > 2**num_questions:
        return False
    people = range(len(worlds[0]))
    # The reply is yes if the asked person and the subject have the same role; for the question
    # about snow, if the asked person is a knight.
    questions = [(asked, subject) for asked in people for subject in (*people, None)]
    for asked, subject in questions:
        yes = [w for w in worlds if w[asked] == (True if subject is None else w[subject])]
        no = [world for world in worlds if world not in yes]
        if yes and no and all(can_be_settled(some, num_questions - 1) for some in (yes, no)):
            return True
    return False
