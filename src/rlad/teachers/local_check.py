"""What can be known of a teacher in this process before its weights are loaded."""

import importlib.util

from rlad.config.teacher import LocalTeacherConfig
from rlad.findings import Finding
from rlad.models.adapters import require_loadable
from rlad.models.files import is_adapter, require_weights
from rlad.models.loading import context_tokens, load_model_config, load_tokenizer, pick_device
from rlad.teachers.base import Setting
from rlad.teachers.compatibility import compare_contexts, compare_tokenizers


def check_teacher(settings: LocalTeacherConfig, setting: Setting) -> list[Finding]:
    config = load_model_config(settings.model)
    require_weights(settings.model)
    if is_adapter(settings.model):
        require_loadable(settings.model, config)
    return [
        *compare_tokenizers(
            setting.student_tokenizer,
            load_tokenizer(settings.model),
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
    device = pick_device(
        setting.config.student.device if settings.device == "auto" else settings.device
    )
    if settings.quantization == "int4" and device.type != "cuda":
        message = f"{what} has no kernel on the device '{device}'; set it to 'int8', or teacher.device to a GPU."
        return [Finding("error", "quantization", message)]
    return [
        Finding(
            "ok",
            "quantization",
            f"linear layers {settings.quantization}, the output layer {settings.dtype}",
        )
    ]
