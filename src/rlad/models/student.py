"""Load the student to train, and the frozen copy of it that is the reference of a KL leash."""

from pathlib import Path

from rlad.config.run import RunConfig
from rlad.errors import UserError, require_package
from rlad.models.files import is_adapter
from rlad.models.loading import LanguageModel, load_language_model
from rlad.seeds import stream_seed


def load_student(config: RunConfig, checkpoint: Path | None = None) -> LanguageModel:
    """Load the model to train: the initial student, or the student in a checkpoint.

    Raises `UserError` if that is not possible.
    """
    settings = config.student
    if checkpoint is None:
        require_base_model(config)
    return load_language_model(
        str(checkpoint or settings.model),
        dtype=settings.dtype,
        device=settings.device,
        trainable=True,
        lora=None if checkpoint else settings.lora,
        seed=stream_seed(config.seed, "lora"),
        end_tokens=settings.end_tokens,
        train_vision=settings.train_vision,
    )


def require_base_model(config: RunConfig) -> None:
    """Raise `UserError` if the student to train is an adapter, or its adapter cannot be made."""
    if is_adapter(config.student.model):
        raise UserError(
            f"student.model = {config.student.model!r} is a LoRA adapter, but a run starts from a "
            "whole model; merge it into its base model (PEFT's merge_and_unload) and give the "
            "folder of the result."
        )
    if config.student.lora:
        require_package("peft", "[student.lora]")


def load_reference(config: RunConfig, student: LanguageModel) -> LanguageModel:
    """Return the frozen initial student: a second copy, or a LoRA student itself, since its base
    weights are the initial student."""
    return student if config.student.lora else load_student(config)
