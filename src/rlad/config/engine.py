"""The `[engine]` section, and which options of `[engine.trl]` change what a run computes."""

from typing import Any, Literal

from pydantic import Field

from rlad.config.types import Section

_CHANGE_NO_NUMBER = frozenset(
    (
        *("ddp_timeout", "teacher_is_sharded", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("log_completions", "num_completions_to_print", "log_unique_prompts", "log_multimodal", "log_completions_hub_repo"),
        *("log_level", "log_level_replica", "log_on_each_node", "logging_first_step", "disable_tqdm", "run_name", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics"),
    )
)


class EngineConfig(Section):
    """What makes the optimiser steps."""

    type: Literal["native", "trl"] = "native"
    """our own loop for one device, or TRL's GRPO trainer (needs `rlad[trl]`)"""
    trl: dict[str, Any] = Field(default={})
    """[engine.trl]: options of TRL's GRPOConfig that no other section decides, such as { ddp_timeout = 3600 }"""


def what_it_computes(section: dict[str, Any]) -> dict[str, Any]:
    """A dumped `[engine]` section without what says how long ranks wait, where weights lie and what is logged."""
    return section | {"trl": {key: value for key, value in section["trl"].items() if key not in _CHANGE_NO_NUMBER}}


def require_values(options: dict[str, Any]) -> None:
    """`ValueError` for values of `[engine.trl]` that we, and not TRL, read."""
    if not isinstance(sharded := options.get("teacher_is_sharded", False), bool):
        raise ValueError(f"engine.trl.teacher_is_sharded is {sharded!r}; use true or false")
    timeout = options.get("ddp_timeout", 1)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < 1e9:
        raise ValueError(f"engine.trl.ddp_timeout is {timeout!r}; use a positive number of seconds, such as 3600")
