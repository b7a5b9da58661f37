"""Rollouts of several turns: the model writes and its environment replies, until one of them ends
the episode.

All running episodes sample their next turn in one call of the sampler. An episode is one sequence:
its prompt, then alternating turns and replies. Only the turns are trained on.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.rollouts.kept_cache import KeptCache
from rlad.rollouts.texts import begun_completion, completion_texts, conversation_text
from rlad.rollouts.turns import TurnTemplate
from rlad.rollouts.types import Asked, Completion, Ending, Rollout, Rows, Sampler, Turn
from rlad.seeds import stream_seed
from rlad.tasks import Problem
from rlad.tasks.answers import without_cut_answer
from rlad.tasks.base import Judgement, cannot_judge
from rlad.tasks.episodes import Environment, EpisodeFailed, EpisodeRules, Step


@dataclass(slots=True)
class Episode:
    """A running episode."""

    group: int
    problem: Problem
    name: str
    prompt: tuple[int, ...]
    environment: Environment
    tokens: list[int] = field(default_factory=list)
    """all tokens after the prompt"""
    logprobs: list[float] = field(default_factory=list)
    actions: list[bool] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    ending: Ending | None = None
    failure: str = ""

    @property
    def sequence(self) -> tuple[int, ...]:
        return (*self.prompt, *self.tokens)

    def begin(self, seed: int) -> None:
        """Reset the environment, whose first text must be the problem's."""
        try:
            text = self.environment.reset(self.problem, seed=seed)
        except EpisodeFailed as failure:
            self.failure = str(failure)
            return
        if text != self.problem.question:
            raise UserError(
                f"the environment begins {self.name} with {text[:60]!r}, but the problem's prompt "
                f"is {self.problem.question[:60]!r}; make the first text depend only on the "
                "problem, so that all rollouts of a group begin with the same text."
            )

    def add(self, completion: Completion) -> None:
        """Append what the model wrote in a turn."""
        self.tokens += completion.token_ids
        self.logprobs += completion.logprobs
        self.actions += [True] * len(completion.token_ids)

    def add_reply(self, token_ids: Sequence[int]) -> None:
        self.tokens += token_ids
        self.logprobs += [0.0] * len(token_ids)
        self.actions += [False] * len(token_ids)

    def take_step(self, written: str, text: str) -> Step | None:
        """Run an environment step with the turn that the model has `written`, passed as `text`.
        Returns None if the environment failed."""
        if not self.failure:
            try:
                step = self.environment.step(text)
            except EpisodeFailed as failure:
                self.failure = str(failure)
            else:
                self.steps.append(step)
                self.turns.append(Turn(written, step.text, step.reward))
                return step
        self.turns.append(Turn(written, "", 0.0))
        return None

    def rollout(self, rules: EpisodeRules) -> Rollout:
        """Return the ended episode with its grade."""
        assert self.ending is not None
        judgement = self._judgement(rules)
        return Rollout(
            Completion(
                tuple(self.tokens),
                tuple(self.logprobs),
                is_truncated=self.ending in ("turns", "tokens", "context"),
                actions=tuple(self.actions),
                ending=self.ending,
            ),
            conversation_text(self.turns),
            str(judgement.verdict),
            judgement.reward,
            judgement.reason,
            judgement.feedback,
            tuple(self.turns),
        )

    def _judgement(self, rules: EpisodeRules) -> Judgement:
        return cannot_judge(self.failure) if self.failure else rules.judge(self.steps)


class EpisodePlayer:
    """The player of the episodes of one `graded_groups` call."""

    def __init__(
        self,
        student: LanguageModel,
        rules: EpisodeRules,
        *,
        rollout: RolloutConfig,
        sampler: Sampler,
        seed: int,
        before_work: Callable[[], None],
        after_group: Callable[[int, tuple[Rollout, ...]], None],
        timer: Callable[[str], AbstractContextManager[None]],
    ):
        """Prepare the player. `after_group` is called with a problem's index and its rollouts once
        all of them have ended."""
        self._tokenizer = student.tokenizer
        self._end_tokens = set(student.eos_token_ids)
        self._rules = rules
        self._rollout = rollout
        self._sampler = sampler
        self._seed = seed
        self._before_work = before_work
        self._after_group = after_group
        self._timer = timer
        self._kept = KeptCache()
        self._template = TurnTemplate(student.tokenizer, rollout)
        contexts = (student.context_tokens, sampler.max_tokens)
        self._context = min((one for one in contexts if one is not None), default=None)
        # A turn may use all tokens that the model may write, unless the task sets a limit.
        most = rollout.max_completion_tokens
        self._most_turn_tokens = min(rules.max_turn_tokens or most, most)

    def play(self, asked: Sequence[Asked]) -> None:
        """Play a group of episodes of each problem."""
        self._template.require_prefix(asked[0].problem.asked)
        if with_pictures := next((one.name for one in asked if one.problem.images), None):
            raise UserError(
                f"{with_pictures} has pictures, but episodes of several turns support only text; "
                "leave the pictures out, or use a task with a single turn."
            )
        group_size = self._rollout.group_size
        episodes: list[Episode] = []
        try:
            for number, one in enumerate(asked):
                for place in range(group_size):
                    environment = self._rules.make()
                    episodes.append(
                        Episode(number, one.problem, one.name, tuple(one.prompt), environment)
                    )
                    episodes[-1].begin(stream_seed(self._seed, "environment", number, place))
            with self._sampler.at_work():
                self._play(episodes)
        finally:
            for episode in episodes:
                episode.environment.close()

    def _play(self, episodes: list[Episode]) -> None:
        group_size = self._rollout.group_size
        groups = [
            episodes[start : start + group_size] for start in range(0, len(episodes), group_size)
        ]

        def after_turn(members: Sequence[Episode], completions: Sequence[Completion]) -> None:
            with self._timer("rewards"):
                for episode, completion in zip(members, completions, strict=True):
                    self._before_work()
                    self._take_turn(episode, completion)
                number = members[0].group
                if not all(one.ending for one in groups[number]):
                    return
                rollouts = tuple(one.rollout(self._rules) for one in groups[number])
            self._after_group(number, rollouts)

        # The first turns of a group have the same prompt, which is prefilled once.
        self._sample(
            [group[0].prompt for group in groups],
            lambda number, completions: after_turn(groups[number], completions),
            group_size=group_size,
            seed=self._seed,
        )
        for turn in range(1, self._rules.max_turns):
            numbers = [i for i, episode in enumerate(episodes) if not episode.ending]
            if not numbers:
                break
            self._sample(
                [episodes[i].sequence for i in numbers],
                partial(_one_by_one, after_turn, [episodes[i] for i in numbers]),
                group_size=1,
                seed=stream_seed(self._seed, "turn", turn),
                rows=Rows(len(episodes), numbers, [self._room(episodes[i]) for i in numbers]),
            )

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        after_group: Callable[[int, list[Completion]], None],
        *,
        group_size: int,
        seed: int,
        rows: Rows | None = None,
    ) -> None:
        self._sampler.sample(
            prompts,
            group_size=group_size,
            max_completion_tokens=self._most_turn_tokens,
            temperature=self._rollout.temperature,
            seed=seed,
            before_token=self._before_work,
            after_group=after_group,
            rows=rows,
            kept=self._kept,
        )

    def _room(self, episode: Episode) -> int:
        """Return the most tokens that the model may write in the next turn; 0 or less means that
        there is no room for one."""
        left = self._left(episode)
        if self._context is not None:
            left = min(left, self._context - len(episode.prompt) - len(episode.tokens))
        return min(left, self._most_turn_tokens)

    def _left(self, episode: Episode) -> int:
        return self._rollout.max_completion_tokens - sum(episode.actions)

    def _take_turn(self, episode: Episode, completion: Completion) -> None:
        """Pass the model's turn to the environment, and append its reply unless the episode has
        ended."""
        # If the template has begun the turn, that text is part of it.
        begun = begun_completion(self._tokenizer, episode.sequence)
        episode.add(completion)
        (written,) = completion_texts(self._tokenizer, [completion])
        text = begun + written
        if completion.is_truncated:
            text = without_cut_answer(text)
        step = episode.take_step(written, text)
        if step is None:
            episode.ending = "failed"
        elif step.done:
            episode.ending = "done"
        elif self._is_cut(episode, completion):
            episode.ending = "tokens" if self._left(episode) <= 0 else "context"
        elif len(episode.turns) == self._rules.max_turns:
            episode.ending = "turns"
        else:
            self._reply(episode, step.text)

    def _is_cut(self, episode: Episode, completion: Completion) -> bool:
        """Return whether a turn ended so that no other turn can follow."""
        return completion.is_truncated and self._room(episode) <= 0

    def _reply(self, episode: Episode, reply: str) -> None:
        last = episode.tokens[-1]
        ids = self._template.reply_ids(
            episode.problem.asked, reply, last, has_ended=last in self._end_tokens
        )
        if self._left(episode) <= 0:
            episode.ending = "tokens"
            return
        length = len(episode.prompt) + len(episode.tokens) + len(ids)
        if self._context is not None and length >= self._context:
            episode.ending = "context"
            return
        episode.add_reply(ids)


def _one_by_one(
    after_turn: Callable[[Sequence[Episode], Sequence[Completion]], None],
    episodes: Sequence[Episode],
    number: int,
    completions: list[Completion],
) -> None:
    after_turn([episodes[number]], completions)
