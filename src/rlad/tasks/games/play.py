"""The base of the built-in games: problems are drawn until one is in the wanted split."""

import random
from abc import ABC, abstractmethod

from rlad.config.task import EpisodesConfig
from rlad.errors import UserError
from rlad.tasks.base import Judgement, Problem, Split, split_of
from rlad.tasks.episodes import Environment, EpisodeRules

MAX_DRAWS = 2_000


class GameTask(ABC):
    """A task with drawn problems, each of which begins an episode of a game."""

    name: str

    def __init__(self, settings: EpisodesConfig) -> None:
        self.episode_rules = EpisodeRules(
            self.make_game, settings.max_turns, settings.max_turn_tokens
        )

    @abstractmethod
    def draw(self, rng: random.Random) -> Problem | None:
        """Draw a problem; None if the draw failed."""

    @abstractmethod
    def make_game(self) -> Environment:
        """Make the environment of one episode."""

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        rng = random.Random(f"{seed}/{split}/{index}")
        # The key decides the split, so a problem in another split is discarded.
        for _ in range(MAX_DRAWS):
            problem = self.draw(rng)
            if problem is not None and split_of(problem.key) == split:
                return problem
        raise UserError(
            f"the task {self.name} found no {split} problem in {MAX_DRAWS} draws: problems with "
            "its settings are too rare; choose others."
        )

    def num_problems(self, split: Split) -> int | None:
        return None

    def judge(self, problem: Problem, completion: str) -> Judgement:
        """Grade a completion as the only turn of an episode."""
        game = self.make_game()
        game.reset(problem, seed=0)
        return self.episode_rules.judge([game.step(completion)])

    def close(self) -> None:
        return
