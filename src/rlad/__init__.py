"""rlad: RL-aware distillation for reasoning language models. Importing it imports no torch."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed, and that one warns of the kernels that a
# machine has no use for. The hub's client says of each of its retries what its last error says.
for _name in ("torchao", "torch.utils._pytree", "huggingface_hub.utils._http"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# A public name is written twice: for type checkers here, and in `_HOME` for everyone else.
if TYPE_CHECKING:
    from rlad.config.file import load_config as load_config
    from rlad.config.run import RunConfig as RunConfig
    from rlad.objectives import OBJECTIVES as OBJECTIVES
    from rlad.objectives.advantages import group_advantages as group_advantages
    from rlad.objectives.aggregate import aggregate as aggregate
    from rlad.objectives.distilled_rl import distilled_rl_loss as distilled_rl_loss
    from rlad.objectives.gkd import gkd_loss as gkd_loss
    from rlad.objectives.grpo import grpo_loss as grpo_loss
    from rlad.objectives.inputs import LossInputs as LossInputs
    from rlad.objectives.kdrl import kdrl_loss as kdrl_loss
    from rlad.objectives.mopd import mopd_loss as mopd_loss
    from rlad.objectives.opd import opd_loss as opd_loss
    from rlad.objectives.opsd import opsd_loss as opsd_loss
    from rlad.objectives.rlsd import rlsd_loss as rlsd_loss
    from rlad.objectives.sdpo import sdpo_loss as sdpo_loss
    from rlad.objectives.sft import sft_loss as sft_loss
    from rlad.objectives.skill_sd import skill_sd_loss as skill_sd_loss
    from rlad.objectives.srpo import srpo_loss as srpo_loss
    from rlad.objectives.topd import topd_advantages as topd_advantages
    from rlad.objectives.topd import topd_loss as topd_loss
    from rlad.objectives.trrd import trrd_loss as trrd_loss
    from rlad.training.run import TrainResult as TrainResult
    from rlad.training.run import train as train

_HOME = {
    "OBJECTIVES": "rlad.objectives",
    "LossInputs": "rlad.objectives.inputs",
    "RunConfig": "rlad.config.run",
    "TrainResult": "rlad.training.run",
    "aggregate": "rlad.objectives.aggregate",
    "distilled_rl_loss": "rlad.objectives.distilled_rl",
    "gkd_loss": "rlad.objectives.gkd",
    "grpo_loss": "rlad.objectives.grpo",
    "group_advantages": "rlad.objectives.advantages",
    "kdrl_loss": "rlad.objectives.kdrl",
    "load_config": "rlad.config.file",
    "mopd_loss": "rlad.objectives.mopd",
    "opd_loss": "rlad.objectives.opd",
    "opsd_loss": "rlad.objectives.opsd",
    "rlsd_loss": "rlad.objectives.rlsd",
    "srpo_loss": "rlad.objectives.srpo",
    "sdpo_loss": "rlad.objectives.sdpo",
    "sft_loss": "rlad.objectives.sft",
    "skill_sd_loss": "rlad.objectives.skill_sd",
    "topd_advantages": "rlad.objectives.topd",
    "topd_loss": "rlad.objectives.topd",
    "train": "rlad.training.run",
    "trrd_loss": "rlad.objectives.trrd",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'rlad' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
