"""Advantages as the native engine makes them, from the rewards that TRL writes to its log."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rlad.objectives.advantages import group_advantages


@contextmanager
def logged_rewards(logs: dict[str, Any]) -> Iterator[Mapping[str, list[float]]]:
    """The rewards that are logged within, by reward function, in full: the log itself keeps one
    generation batch at most."""
    kept = logs["rewards"]
    logged = defaultdict(list)
    logs["rewards"] = logged
    try:
        yield logged
    finally:
        logs["rewards"] = kept
        for name, values in logged.items():
            kept[name].extend(values)


def advantages_from(
    logged: Mapping[str, Sequence[float]],
    names: Sequence[str],
    weights: Tensor,
    *,
    num_rows: int,
    group_size: int,
    scale: str,
) -> tuple[Tensor, Tensor]:
    """Advantages, float64, and which completions were judged, bool, both `[num_rows]`.

    `names` and `weights` are those of the reward functions, some of which may share a name; a
    reward that is NaN is none.
    """
    # Reward functions of one name write into one log, one after the other: each takes its own rows.
    values = {name: iter(rewards) for name, rewards in logged.items()}
    each = torch.tensor(
        [list(islice(values[name], num_rows)) for name in names], dtype=torch.float64
    ).T
    judged = each.isfinite().any(dim=1)
    rewards = (each * weights.double()).nansum(dim=1)
    return group_advantages(
        rewards, group_size, scale="none" if scale == "none" else "std", judged=judged
    ), judged
