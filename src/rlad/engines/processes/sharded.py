"""A student whose weights FSDP2 has split over the ranks; what is said of all ranks here, a model that is not split ignores."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlad.models.loading import LanguageModel


def parts_of(model: Any) -> list[FSDPModule]:
    """The modules that FSDP2 gathers and splits again; none where it has not split the model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """Inside the block each rank holds all weights and may run the model as often as it likes, alone; all ranks enter it."""
    parts = parts_of(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def as_number(norm: Any) -> float:
    """A gradient's norm; all ranks call it."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def weights_here(model: Any) -> Iterator[Tensor]:
    """What this rank holds of each weight."""
    return (weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters())


def save_split_model(student: LanguageModel, trainer: Any, folder: Path) -> None:
    """Gather the weights of all ranks, and let the first write them as a Hugging Face folder; all ranks call it."""
    if not parts_of(student.model):
        return
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        student.model.save_pretrained(folder, state_dict=weights)
        student.tokenizer.save_pretrained(folder)
