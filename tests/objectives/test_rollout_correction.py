"""How the weights of another sampler's tokens are made: by hand, and the invariances."""

import math

import pytest
import torch
from torch import Tensor

from rlad.objectives.rollout_weights import rollout_weights

MASK = torch.tensor([[True, True, True], [True, True, False]])
OLD = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.5, math.nan]])
# πold / πrollout = 2, 0.5, 8 of the first row; 1, 4 of the second.
ROLLOUT = OLD - torch.tensor([[2.0, 0.5, 8.0], [1.0, 4.0, 1.0]]).log()


def weights(mode: str, rollout: Tensor = ROLLOUT, **bounds: float | None) -> tuple[Tensor, Tensor]:
    return rollout_weights(
        old_logprobs=OLD, rollout_logprobs=rollout, mask=MASK, mode=mode, **bounds
    )


@pytest.mark.parametrize(
    ("mode", "bounds", "wanted", "num_bounded"),
    [
        ("none", {}, [[1, 1, 1], [1, 1, 1]], 0),
        ("none", {"clip_max": 0.5}, [[1, 1, 1], [1, 1, 1]], 0),
        ("token_truncate", {"clip_max": 3.0}, [[2, 0.5, 3], [1, 3, 1]], 2),
        ("token_truncate", {"clip_min": 0.6, "clip_max": None}, [[2, 0.6, 8], [1, 4, 1]], 1),
        # IcePop: a band, and nothing outside of it trains.
        ("token_mask", {"clip_min": 0.6, "clip_max": 3.0}, [[2, 0, 0], [1, 0, 1]], 3),
        # Of whole sequences: 2 * 0.5 * 8 = 8 and 1 * 4 = 4.
        ("sequence_truncate", {"clip_max": 5.0}, [[5, 5, 5], [4, 4, 1]], 3),
        ("sequence_mask", {"clip_max": 5.0}, [[0, 0, 0], [4, 4, 1]], 3),
    ],
)
def test_by_hand(mode, bounds, wanted, num_bounded) -> None:
    found, bounded = weights(mode, **bounds)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32))
    assert int(bounded.sum()) == num_bounded


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_mask"])
def test_a_sampler_that_agrees_or_says_nothing_changes_nothing(mode: str) -> None:
    for rollout in (OLD, torch.full_like(OLD, math.nan)):
        found, bounded = weights(mode, rollout)
        assert (found == 1).all() and not bounded.any()


def test_no_logprob_makes_a_weight_infinite() -> None:
    far = torch.full_like(OLD, -1000.0)
    found, _ = weights("token_truncate", far, clip_max=None)
    assert found.isfinite().all()
