"""The language part of a vision model, and its vision part."""

from typing import Any

import torch
from transformers import PreTrainedModel


def language_parameters(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters of a model's language part and its output layer."""
    return {id(one) for part in _language_parts(model) for one in part.parameters()}


def _language_parts(model: Any) -> list[torch.nn.Module]:
    decoder = model.base_model.get_decoder()
    head = model.get_output_embeddings()
    return [decoder, model.get_input_embeddings(), *([head] if head is not None else [])]


def freeze_vision(model: PreTrainedModel) -> None:
    """Freeze everything except the language part: the vision tower and its projector."""
    kept = language_parameters(model)
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def vision_modules(model: PreTrainedModel) -> list[str]:
    """Name the modules outside the language part, which adapters skip."""
    kept = {id(module) for part in _language_parts(model) for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) not in kept and isinstance(module, torch.nn.Linear)
    ]
