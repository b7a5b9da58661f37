"""What can be known of a teacher in this process before its weights are loaded. Imports no
torch."""

import importlib.util

from rlad.config.teacher import LocalTeacherConfig
from rlad.findings import Finding
from rlad.models.facts import config_of, device_name, tokenizer_of
from rlad.models.files import context_tokens, is_adapter, require_weights
from rlad.teachers.base import Setting
from rlad.teachers.compatibility import compare_contexts, compare_tokenizers


def check_teacher(settings: LocalTeacherConfig, setting: Setting) -> list[Finding]:
    config = config_of(settings.model)
    require_weights(settings.model)
    if is_adapter(settings.model):
        from rlad.models.adapters import (
            require_loadable,  # imports torch; what PEFT can load, only PEFT knows
        )

        require_loadable(settings.model, config)
    return [
        *compare_tokenizers(
            setting.student_tokenizer,
            tokenizer_of(settings.model),
            setting.config.student.end_tokens,
        ),
        compare_contexts(setting.config.rollout, setting.student_context, context_tokens(config)),
        *_check_quantization(settings, setting),
    ]


def _check_quantization(settings: LocalTeacherConfig, setting: Setting) -> list[Finding]:
    if settings.quantization == "none":
        return []
    what = f"teacher.quantization = {settings.quantization!r}"
    if any(importlib.util.find_spec(package) is None for package in ("torchao", "accelerate")):
        message = f"{what} needs torchao and accelerate; install them with: pip install 'rlad[quantization]'."
        return [Finding("error", "quantization", message)]
    if is_adapter(settings.model):
        message = f"{settings.model!r} is an adapter, and {what} is for whole models; merge it into its base model first."
        return [Finding("error", "quantization", message)]
    device = device_name(
        setting.config.student.device if settings.device == "auto" else settings.device
    )
    if settings.quantization == "int4" and not device.startswith("cuda"):
        message = f"{what} has no kernel on the device {device!r}; set it to 'int8', or teacher.device to a GPU."
        return [Finding("error", "quantization", message)]
    return [
        Finding(
            "ok",
            "quantization",
            f"linear layers {settings.quantization}, the output layer {settings.dtype}",
        )
    ]
