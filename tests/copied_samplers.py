"""A sampler with a copy of the student in this process; like a vLLM server, it writes ahead."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlad.config.run import RolloutConfig
from rlad.models.loading import LanguageModel
from rlad.rollouts.copied_student import CopiedStudent, Limits, Prompts
from rlad.rollouts.sampling import sample
from rlad.rollouts.types import Completion

AHEAD: dict[str, Any] = {
    "engine": "vllm",
    "max_staleness": 1,
    "vllm": {"urls": ["http://127.0.0.1:9"]},
}
"""settings of [rollout] with which such a sampler may take a server's place"""


class CopySampler(CopiedStudent):
    """Exact: tokens and log-probs are those of our own decoder under the weights that it holds."""

    def __init__(
        self,
        student: LanguageModel,
        rollout: RolloutConfig,
        before_work: Callable[[], None] = lambda: None,
    ):
        super().__init__(student, rollout)
        self.description = "a copy"
        self._copy = replace(student, model=copy.deepcopy(student.model))
        self._max_tokens = 256
        self._begun: tuple[Any, list[list[Completion]]] | None = None
        self.num_hand_overs = 0

    def begin(self, prompts: Prompts, *, seed: int, **settings: Any) -> None:
        before_token = settings.pop("before_token", lambda: None)
        max_tokens = [settings["max_completion_tokens"]] * len(prompts)
        self._make_current(prompts, max_tokens, before_token)
        written = sample(self._copy, prompts, seed=seed, **settings)
        self._begun = ((list(map(list, prompts)), seed), written)

    def has_begun(self, prompts: Prompts, seed: int) -> bool:
        return self._begun is not None and self._begun[0] == (list(map(list, prompts)), seed)

    def _hand_over(self) -> None:
        self.num_hand_overs += 1
        with torch.no_grad():
            for mine, theirs in zip(
                self._copy.model.parameters(), self._student.model.parameters(), strict=True
            ):
                mine.copy_(theirs)

    def _complete(
        self,
        prompts: Prompts,
        limits: Limits,
        seed: int,
        before_token: Callable[[], None],
        after_request: Callable[[int, list[Completion]], None],
    ) -> None:
        if self._begun is not None and self.has_begun(prompts, seed):
            written = self._begun[1]
            self._begun = None
        else:
            written = sample(
                self._copy,
                prompts,
                group_size=limits["n"],
                max_completion_tokens=limits["max_tokens"],
                temperature=limits["temperature"],
                seed=seed,
                before_token=before_token,
                rows=limits.get("rows"),
            )
        for number, completions in enumerate(written):
            after_request(number, completions)

    @property
    def _more_tokens(self) -> str:
        return "use another test"
