"""Rotary positions whose frequencies depend on the longest sequence in the forward pass.

For the types `longrope` (Phi-3, Phi-4) and `dynamic`, transformers uses other frequencies for all
positions once a row is longer than a limit. Up to the limit a token's log-prob does not depend on
later tokens or other rows. Beyond it the log-prob would depend on both, so sampler and scorer could
not agree. Such a model is therefore used only up to its limit.
"""

from collections.abc import Iterator
from typing import Any

_DEPEND_ON_LENGTH = ("longrope", "dynamic")


def longest_with_one_rope(config: Any) -> int | None:
    """Return the longest sequence for which a model's positions have one meaning; None without a
    limit."""
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
    """Yield the settings of each kind of layer, or those common to all layers."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    yield from nested or [parameters]
