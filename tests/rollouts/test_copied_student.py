"""The check after a hand-over, where several engines hold a copy of the student."""

import math
from dataclasses import replace
from typing import Any

import pytest

from copied_samplers import CopySampler
from rlad.config.run import RolloutConfig
from rlad.errors import RunFailedError
from tiny_models import tiny_language_model


@pytest.mark.parametrize(("off", "said"), [(0.5, "0.5"), (math.nan, "nan")])
def test_the_copy_that_is_wrong_is_named(off: float, said: str) -> None:
    class SeveralCopies(CopySampler):
        def _written_by_each_copy(self, *asked: Any) -> Any:
            ((_, good),) = super()._written_by_each_copy(*asked).items()
            wrong = [
                replace(one, logprobs=tuple(value - off for value in one.logprobs)) for one in good
            ]
            return {"vLLM at http://a": good, "vLLM at http://b": wrong, "vLLM at http://c": good}

    sampler = SeveralCopies(tiny_language_model(), RolloutConfig(max_completion_tokens=8))
    with pytest.raises(
        RunFailedError, match=rf"^vLLM at http://b does not sample .* trainer's by {said} nats on"
    ):
        sampler.sample(
            [[3, 4, 5], [6, 7]], group_size=2, max_completion_tokens=8, temperature=1.0, seed=0
        )
    assert sampler.num_hand_overs == 2
