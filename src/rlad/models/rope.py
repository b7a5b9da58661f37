"""Rotary positions whose frequencies depend on the longest sequence that is in the forward pass.

Of the types `longrope` (Phi-3, Phi-4) and `dynamic`, transformers takes other frequencies for all
positions once a row is longer than a border. Up to it every token has one log-prob, whatever is
beside it or comes after it; beyond it the log-prob of a token would depend on both, so that
sampler and scorer could not agree. Such a model is therefore used up to its border alone.
"""

from collections.abc import Iterator
from typing import Any

_DEPEND_ON_LENGTH = ("longrope", "dynamic")


def longest_with_one_rope(config: Any) -> int | None:
    """Return the most tokens of a sequence for which a model's positions have one meaning; None
    where that is any number."""
    text = config.get_text_config()
    borders = [
        settings.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for settings in _ropes(getattr(text, "rope_parameters", None) or {})
        if settings.get("rope_type") in _DEPEND_ON_LENGTH
    ]
    return min(borders, default=None)


def _ropes(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings of each kind of layer, or the ones of all."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    yield from nested or [parameters]
