"""Compute sizes of models without loading weights, by building them on torch's meta device."""

import torch
from transformers import PreTrainedModel

from rlad.config.run import LoraConfig
from rlad.errors import UserError
from rlad.models.adapters import add_lora
from rlad.models.loading import missing_package
from rlad.models.vision import auto_class
from rlad.models.without_weights import load_model_config


def num_parameters(name: str) -> int:
    """Count a model's weights, tied ones once."""
    return sum(parameter.numel() for parameter in weightless_model(name).parameters())


def num_adapter_parameters(name: str, lora: LoraConfig) -> int:
    """Count the weights of an adapter on a model. Raises `UserError` if it does not fit."""
    model = weightless_model(name)
    with torch.device("meta"):
        add_lora(model, lora, base=name, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def quantized_bytes(name: str, quantization: str, width: int) -> int:
    """Count the bytes of a model whose linear layers, except the output layer, are quantised.

    Its other weights take `width` bytes each. torchao stores int8 with a float32 scale and an int8
    zero point per output, and int4 with a scale and a zero point in bfloat16 per 64 inputs of each
    output.
    """
    model = weightless_model(name)
    total = width * sum(parameter.numel() for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            # Subtract the plain weights, and add the packed ones with scales and zero points.
            total -= width * layer.weight.numel()
            if quantization == "int8":
                total += layer.weight.numel() + 5 * layer.out_features
            else:
                num_groups = layer.out_features * -(-layer.in_features // 64)
                total += layer.weight.numel() // 2 + 4 * num_groups
    return total


def weightless_model(name: str) -> PreTrainedModel:
    """Build a model on the meta device. Raises `UserError` if it is not a causal language model."""
    config = load_model_config(name)
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config)
    except ImportError as error:
        raise missing_package(name, error) from None
    except ValueError as error:  # an architecture for something else
        raise UserError(
            f"{name!r} is not a causal language model ({str(error).splitlines()[0]}); give one."
        ) from None
