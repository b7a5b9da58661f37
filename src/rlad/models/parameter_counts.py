"""Models without weights, on torch's meta device: how many parameters they have."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlad.config.run import LoraConfig
from rlad.errors import UserError
from rlad.models.adapters import add_lora
from rlad.models.loading import load_model_config


def num_parameters(name: str) -> int:
    """Tied ones once. `UserError` when it is no causal language model."""
    return sum(parameter.numel() for parameter in _weightless_model(name).parameters())


def num_adapter_parameters(name: str, lora: LoraConfig) -> int:
    """Of an adapter on a model. `UserError` when it does not fit."""
    model = _weightless_model(name)
    with torch.device("meta"):
        add_lora(model, lora, base=name, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def quantized_bytes(name: str, quantization: str, width: int) -> int:
    """Of weights of `width` bytes each, but those of the linear layers, without the output layer,
    which are quantised."""
    model = _weightless_model(name)
    head, total = (
        model.get_output_embeddings(),
        width * sum(parameter.numel() for parameter in model.parameters()),
    )
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            total += _quantized_bytes(layer, quantization) - width * layer.weight.numel()
    return total


def _quantized_bytes(layer: torch.nn.Linear, quantization: str) -> int:
    """As torchao stores weights: int8 with a float32 scale and an int8 zero point for each output;
    int4 with a scale and a zero point in bfloat16 for each 64 inputs of each output.
    """
    if quantization == "int8":
        return layer.weight.numel() + 5 * layer.out_features
    return layer.weight.numel() // 2 + 4 * layer.out_features * -(-layer.in_features // 64)


def _weightless_model(name: str) -> PreTrainedModel:
    config = load_model_config(name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError(
            f"{name!r} is no causal language model ({str(error).splitlines()[0]}); give one."
        ) from None
