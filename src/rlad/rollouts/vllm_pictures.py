"""Pictures for vLLM in this process, and tokens that no vLLM may draw.

vLLM gets the prompt's tokens and, for each placeholder, the feature that the student's own vision
tower computes. So only the student's processor is used, and neither tower nor pictures are copied.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from rlad.errors import UserError
from rlad.models.pictures import PicturedPrompt
from rlad.models.vision import Sight, Vision

TESTED = ("llava", "idefics3", "smolvlm", "qwen2_vl", "qwen3_vl")
"""The `model_type` of models whose features vLLM takes in the form of `_items`."""
_BIAS = 100.0
"""Added to the logit of a placeholder, after division by the temperature. It is never drawn in
float32, and its original probability can still be computed."""


def engine_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a vLLM that takes features of pictures, for a model's config."""
    # With a limit of 0 vLLM would leave out the unused tower, but also the features that enter
    # deeper layers.
    is_deep = bool(getattr(config.vision_config, "deepstack_visual_indexes", None))
    return {
        "limit_mm_per_prompt": {"image": int(is_deep), "video": 0},
        "enable_mm_embeds": True,
        "skip_mm_profiling": True,
        "mm_processor_cache_gb": 0,
    }


def vllm_model(architecture: str) -> Any:
    """Return vLLM's class of a model. Raises `ImportError` if it needs a missing package."""
    vllm: Any = import_module("vllm")
    return vllm.ModelRegistry.models[architecture].load_model_cls()


def leave_out_processor(architecture: str) -> None:
    """Make vLLM start a model without its processor, which would be a second one."""
    base: Any = import_module("vllm.multimodal.processing").BaseProcessingInfo

    class Info(base):
        def get_supported_mm_limits(self) -> Mapping[str, int | None]:
            return {"image": None}

        def get_mm_max_tokens_per_item(
            self, seq_len: int, mm_counts: Mapping[str, int]
        ) -> Mapping[str, int]:
            return {"image": seq_len}

    model = vllm_model(architecture)
    if "_processor_factory" in vars(model):
        del model._processor_factory  # otherwise vLLM warns
    registry: Any = import_module("vllm.multimodal").MULTIMODAL_REGISTRY
    register = registry.register_processor(
        lambda info, _: SimpleNamespace(info=info), info=Info, dummy_inputs=lambda _: None
    )
    register(model)


def engine_prompt(prompt: PicturedPrompt, sight: Sight, vision: Vision) -> dict[str, Any]:
    """Return a prompt with the features of its pictures, as vLLM's engine takes it."""
    inputs: Any = import_module("vllm.multimodal.inputs")
    kwargs = inputs.MultiModalKwargsItems.from_hf_inputs(*_items(sight, inputs))
    token = vision.placeholder_ids[0]
    places = [place for place, one in enumerate(prompt) if one == token]
    sizes = [len(feature) for feature in sight.features]
    if len(places) != sum(sizes):
        raise UserError(
            f"a prompt has {len(places)} placeholders of pictures, but {vision.name!r} computes "
            f"{sum(sizes)} features for them; use another model, or rollout.engine = 'native'."
        )
    own = [places[sum(sizes[:number]) :][:size] for number, size in enumerate(sizes)]
    ranges = []
    for those in own:
        mask = torch.tensor([one == token for one in prompt[those[0] : those[-1] + 1]])
        is_all = bool(mask.all())
        ranges.append(
            inputs.PlaceholderRange(
                offset=those[0], length=len(mask), is_embed=None if is_all else mask
            )
        )
    # The features of a picture may depend on the other pictures of its prompt.
    digest = hashlib.sha256("".join(one.digest for one in prompt.pictures).encode()).hexdigest()
    return {
        "type": "multimodal",
        "prompt_token_ids": list(prompt),
        "mm_kwargs": kwargs,
        "mm_hashes": {"image": [f"{digest}-{number}" for number in range(len(sizes))]},
        "mm_placeholders": {"image": ranges},
    }


def _items(sight: Sight, inputs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the features in vLLM's form, and how they are split into items."""
    fields: Any = inputs.MultiModalFieldConfig
    features = [one.detach().cpu() for one in sight.features]
    if sight.grids is None:
        return {"image_embeds": torch.stack(features)}, {"image_embeds": fields.batched("image")}
    sizes = torch.tensor([len(one) for one in features])
    return (
        {"image_embeds": torch.cat(features), "image_grid_thw": sight.grids.cpu()},
        {
            "image_embeds": fields.flat_from_sizes("image", sizes),
            "image_grid_thw": fields.batched("image", keep_on_cpu=True),
        },
    )


def never_drawn(ids: Sequence[int], temperature: float) -> dict[str, Any]:
    """Return the sampling parameters with which some tokens are never drawn."""
    if not ids:
        return {}
    bias = -_BIAS * (temperature or 1.0)
    # One more, since a server counts the sampled token among the requested ones.
    named = [*ids, ids[0]]
    return {
        "logit_bias": dict.fromkeys(ids, bias),
        "logprob_token_ids": named,
        "logprobs": len(named),
    }


def log_normaliser(entry: Mapping[int, Any], ids: Sequence[int]) -> float:
    """Return what to subtract from a log-prob that excludes the tokens that are never drawn, to get
    the log-prob over the whole vocabulary."""
    return math.log1p(sum(math.exp(entry[one].logprob + _BIAS) for one in ids))
