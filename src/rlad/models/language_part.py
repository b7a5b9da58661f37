"""What of a model that sees is its language part, and what its eyes."""

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
    """Freeze all but the language part: the tower, and what joins it to the language part."""
    kept = language_parameters(model)
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def vision_modules(model: PreTrainedModel) -> list[str]:
    """Name the modules that are not of the language part, for adapters to pass over."""
    kept = {id(module) for part in _language_parts(model) for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) not in kept and isinstance(module, torch.nn.Linear)
    ]
