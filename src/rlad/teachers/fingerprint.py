"""A fingerprint of weights that changes if any of them changes."""

import hashlib
import json
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from rlad.models.loading import LanguageModel


def weights_fingerprint(language_model: LanguageModel, *, without: Collection[str] = ()) -> str:
    """Return the sha256 (hexadecimal) of the model's config, its compute type, and name, type,
    shape and bytes of each tensor.

    It reads the weights in memory, so it covers quantisation, adapters and random weights. It takes
    about half a second per GiB. The adapters named in `without` are left out.
    """
    model = language_model.model
    config = model.config.to_dict()
    for says_nothing in ("_name_or_path", "transformers_version"):
        config.pop(says_nothing, None)
    adapters = {
        name: settings.to_dict()
        for name, settings in getattr(model, "peft_config", {}).items()
        if name not in without
    }
    settings = [config, str(language_model.compute_dtype), adapters]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=_shown).encode())
    # Sorted, so that the order in which a model was built makes no difference.
    for name, tensor in sorted(model.state_dict().items()):
        # The student's adapter is in the same model and changes with every step, but it is not part
        # of the teacher.
        if any(f".{adapter}." in name for adapter in without):
            continue
        for part, plain in _plain_tensors(name, tensor):
            digest.update(f"{part} {plain.dtype} {tuple(plain.shape)}".encode())
            values = plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().data)
    return digest.hexdigest()


def _shown(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or the tensors that a quantised tensor consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor
