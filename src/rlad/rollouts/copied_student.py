"""A sampler whose engine has a second copy of the student.

After an update that copy is stale. Before the next completions are sampled, the trainer's weights
are handed over, and the trainer scores a few sampled tokens to check that they have arrived.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlad.config.run import RolloutConfig
from rlad.errors import RunFailedError, UserError
from rlad.models.loading import LanguageModel
from rlad.rollouts.types import Completion, Rows, Sampler
from rlad.scoring.scorer import Scorer

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# The check of a hand-over: the number of prompts, and the tokens of the one completion of each.
NUM_CHECKED_PROMPTS = 4
NUM_CHECKED_TOKENS = 16

Prompts = Sequence[Sequence[int]]
Limits = dict[str, Any]
"""The sampling parameters of vLLM that differ from call to call; "rows" if they differ from prompt
to prompt."""


def request_limits(limits: Limits, number: int, seed: int) -> tuple[Limits, int]:
    """Return the sampling parameters of a call's prompt, and its seed."""
    common = {key: value for key, value in limits.items() if key != "rows"}
    rows: Rows | None = limits.get("rows")
    if rows is not None:
        common["max_tokens"] = rows.max_tokens[number]
        number = rows.numbers[number]
    # vLLM adds the index in the group.
    return common, (seed + number * common["n"]) % 2**63


class CopiedStudent(Sampler):
    """A sampler with a copy of a student, which is updated and checked."""

    name = "vllm"
    is_trainers_own = False

    def __init__(self, student: LanguageModel, rollout: RolloutConfig):
        self._student = student
        self._rollout = rollout
        self._scorer = Scorer(student, temperature=rollout.temperature, tokens_per_batch=2**14)
        self._tolerance = rollout.vllm.tolerance or TOLERANCE[student.compute_dtype]
        self._is_stale = True
        self._is_checked = False
        self._max_tokens = 0
        """The most tokens of a prompt with its completion that the engine takes."""

    @abstractmethod
    def _hand_over(self) -> None:
        """Give the engine the student's weights."""

    @abstractmethod
    def _complete(
        self,
        prompts: Prompts,
        limits: Limits,
        seed: int,
        before_token: Callable[[], None],
        after_request: Callable[[int, list[Completion]], None],
    ) -> None:
        """Complete all prompts; `after_request` gets each prompt's index and completions."""

    @property
    def max_tokens(self) -> int | None:
        return self._max_tokens or None

    def weights_changed(self) -> None:
        self._is_stale = True

    def update_weights(self) -> None:
        if self._is_stale:
            self._hand_over()
            self._is_stale = False
            self._is_checked = False

    def sample(
        self,
        prompts: Prompts,
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        seed: int,
        before_token: Callable[[], None] = lambda: None,
        after_group: Callable[[int, list[Completion]], None] = lambda number, completions: None,
        rows: Rows | None = None,
        kept: Any = None,
    ) -> list[list[Completion]]:
        """Sample as documented in `rlad.rollouts.sampling.sample`. Earlier turns are in vLLM's own
        prefix cache.

        Each completion has its own seed, so it depends on the others only by rounding.
        """
        limits = self._limits(group_size, max_completion_tokens, temperature)
        if rows is not None:
            limits["rows"] = rows
        if not self.has_begun(prompts, seed):
            most = rows.max_tokens if rows else [max_completion_tokens] * len(prompts)
            self._make_current(prompts, most, before_token)

        def after_request(number: int, written: list[Completion]) -> None:
            groups[number] = written * (group_size // limits["n"])
            after_group(number, groups[number])

        groups: dict[int, list[Completion]] = {}
        self._complete(prompts, limits, seed, before_token, after_request)
        # An engine that was restarted in the meantime has received the weights again.
        if not (self._is_checked or self._is_stale):
            self._check(prompts, before_token)
        return [groups[number] for number in range(len(prompts))]

    def _limits(self, group_size: int, max_completion_tokens: int, temperature: float) -> Limits:
        # Greedy completions of one prompt are all the same, so sample only one.
        num_written = group_size if temperature else 1
        return {"n": num_written, "max_tokens": max_completion_tokens, "temperature": temperature}

    def _make_current(
        self, prompts: Prompts, max_tokens: Sequence[int], before_token: Callable[[], None]
    ) -> None:
        """Make sure that the engine has the current student, and room for these prompts with
        `max_tokens` after each."""
        longest = max(len(one) + most for one, most in zip(prompts, max_tokens, strict=True))
        if longest > self._max_tokens:
            raise UserError(
                f"a prompt and its completion may have {longest} tokens, but vLLM was started for "
                f"{self._max_tokens}; lower rollout.max_completion_tokens, or {self._more_tokens}."
            )
        self.update_weights()
        if not self._is_checked:
            self._check(prompts, before_token)

    @property
    @abstractmethod
    def _more_tokens(self) -> str:
        """Advice to the user for longer sequences."""

    # --- check ------------------------------------------------------------------------------------

    def _check(self, prompts: Prompts, before_token: Callable[[], None]) -> None:
        """Compare the log-probs of a few sampled tokens with the trainer's.

        Weights that have not arrived are handed over once more. Raises `RunFailedError` if that
        does not help.
        """
        difference, copy = self._difference(prompts, before_token)
        if not difference <= self._tolerance:  # NaN too
            self._hand_over()
            difference, copy = self._difference(prompts, before_token)
        if not difference <= self._tolerance:
            raise RunFailedError(
                f"{copy} does not sample from the student's weights: after two hand-overs its "
                f"log-probs differ from the trainer's by {difference:.2g} nats on average, but "
                f"rollout.vllm.tolerance is {self._tolerance:g}; start a new run with "
                "rollout.engine = 'native' and the last checkpoint as student.model, and report "
                "the model and the version of vLLM."
            )
        self._is_checked = True

    def _difference(self, prompts: Prompts, before_token: Callable[[], None]) -> tuple[float, str]:
        """Measure the mean absolute difference in nats over the tokens of a short completion of
        each prompt. Return the largest over all copies, and the name of that copy."""
        asked = prompts[:NUM_CHECKED_PROMPTS]
        num_tokens = min(NUM_CHECKED_TOKENS, self._rollout.max_completion_tokens)
        limits = self._limits(1, num_tokens, self._rollout.temperature)
        copies = self._written_by_each_copy(asked, limits, before_token)
        differences = []
        for written in copies.values():
            scores = self._scorer.score(asked, [one.token_ids for one in written])
            theirs = torch.tensor([value for one in written for value in one.logprobs])
            differences.append((torch.cat(scores) - theirs).abs().mean())
        largest = torch.stack(differences).max(dim=0)  # NaN where one is
        return float(largest.values), list(copies)[int(largest.indices)]

    def _written_by_each_copy(
        self, prompts: Prompts, limits: Limits, before_token: Callable[[], None]
    ) -> dict[str, list[Completion]]:
        """Complete the prompts once with every copy of the student; keys are the copies' names in
        messages."""
        completed: dict[int, Completion] = {}
        self._complete(
            prompts,
            limits,
            0,
            before_token,
            lambda number, group: completed.update({number: group[0]}),
        )
        return {"vLLM": [completed[number] for number in range(len(prompts))]}
