"""Pictures for a vision model: its processor turns pictures into token ids and pixels, its vision
tower computes features of the pixels, and its language part reads them in place of placeholders.

Features are computed for each prompt separately and joined for a batch. So the features of a prompt
do not depend on other prompts, and rows of one prompt share them.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from rlad.errors import UserError
from rlad.models.grid_processor import GridProcessor
from rlad.models.pictures import Picture, PicturedPrompt, pictures_of, require_blind_prompts
from rlad.text import first_line

MAX_KEPT_BYTES = 512 * 2**20
"""Most bytes of features kept from a frozen vision tower; the oldest are dropped first."""
_FEATURES = ("pooler_output", "deepstack_features")
_MOST_DIFFERENCE = 0.02
"""Largest difference of a token's last states, relative to their norm; bfloat16 causes less."""
_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")


def sees(config: PretrainedConfig) -> bool:
    """Return whether a model with this config reads pictures."""
    has_tower = getattr(config, "vision_config", None) is not None
    return has_tower and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: PretrainedConfig) -> Any:
    """Return transformers' auto class for the model of a config, including its vision part."""
    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def placeholder_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the placeholder tokens of pictures, films and sound, which no completion may
    contain."""
    found = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return tuple(dict.fromkeys(one for one in found if isinstance(one, int)))


def load_processor(name: Any, tokenizer: Any, config: PretrainedConfig) -> Any:
    """Load the processor of a model's folder or name. Raises `UserError` without one."""
    failure: Exception
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        if getattr(processor, "image_processor", None) is not None:
            return processor
        failure = ValueError("it has no image processor")
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        failure = error
    try:
        # A processor that also reads films needs torchvision; for pictures it is not needed.
        token = tokenizer.convert_ids_to_tokens(placeholder_ids(config)[0])
        return GridProcessor.from_pretrained(name, tokenizer, token)
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"no processor of pictures can be loaded from {str(name)!r} ({first_line(failure)}); "
            "save it beside the model with `processor.save_pretrained(folder)`, and install what "
            "it asks for."
        ) from None


@dataclass(slots=True)
class Sight:
    """The features of one prompt's pictures."""

    outputs: Any
    """outputs of vision tower and projector, in the form of transformers' `mm_encoder_outputs`"""
    positions: Tensor | None
    """positions of the prompt's tokens [3, token] if pictures have rows and columns; None: 0, 1,
    2, ..."""
    grids: Tensor | None = None
    """[picture, 3] patches in time, rows and columns, for a model whose positions depend on them"""
    num_bytes: int = 0

    @property
    def features(self) -> list[Tensor]:
        """Return the features that replace the tokens of each picture, or of each of its tiles,
        [token, number]. Features that enter deeper layers come after them."""
        layers = [self.outputs.pooler_output, *(self.outputs.get("deepstack_features") or [])]
        return [torch.cat(list(parts), dim=-1) for parts in zip(*layers, strict=True)]


@dataclass
class Vision:
    """The picture processor of one model, with the features that were computed."""

    name: str
    where: Any
    """the folder or name from which its processor is loaded on first use"""
    tokenizer: Any
    config: PretrainedConfig
    keeps_features: bool = True
    """whether the vision tower never changes, so that its features stay valid"""
    _kept: OrderedDict[PicturedPrompt, Sight] = field(default_factory=OrderedDict, repr=False)
    _ids_of: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _is_compared: bool = field(default=False, repr=False)

    @cached_property
    def processor(self) -> Any:
        """The processor. Raises `UserError` if it cannot be loaded."""
        return load_processor(self.where, self.tokenizer, self.config)

    @cached_property
    def has_processor(self) -> bool:
        """Whether there is a processor; training on texts does not need one."""
        try:
            return self.processor is not None
        except UserError:
            return False

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        return placeholder_ids(self.config)

    @property
    def placeholders(self) -> list[str]:
        """The tokens with these ids, as texts."""
        ids = [one for one in self.placeholder_ids if one < len(self.tokenizer)]
        return self.tokenizer.convert_ids_to_tokens(ids)

    # --- from pictures to tokens and pixels -------------------------------------------------------

    @property
    def token(self) -> str:
        """The placeholder of a picture in a text, before it is repeated for each of its tokens."""
        return self.processor.image_token

    @property
    def wrapped_token(self) -> str:
        """The placeholder as a text without a chat template needs it."""
        marks = [getattr(self.config, f"vision_{end}_token_id", None) for end in ("start", "end")]
        if not all(isinstance(mark, int) for mark in marks):
            return self.token
        start, end = self.tokenizer.convert_ids_to_tokens(marks)
        return f"{start}{self.token}{end}"

    def prompt(
        self, text: str, pictures: Sequence[Picture], *, add_special_tokens: bool
    ) -> PicturedPrompt:
        """Tokenize a text whose placeholders, one for each picture, become as many tokens as the
        pictures have."""
        made = self._processed(text, pictures, add_special_tokens=add_special_tokens)
        return PicturedPrompt(torch.as_tensor(made["input_ids"])[0].tolist(), pictures)

    def ids_of(self, picture: Picture) -> tuple[int, ...]:
        """Return the tokens of a picture: placeholders, and marks of the processor."""
        if picture.digest not in self._ids_of:
            made = self.prompt(self.token, [picture], add_special_tokens=False)
            self._ids_of[picture.digest] = tuple(made)
        return self._ids_of[picture.digest]

    def num_tokens(self, picture: Picture) -> int:
        """Count the placeholder tokens of a picture."""
        return sum(one in self.placeholder_ids for one in self.ids_of(picture))

    def pixels(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Return the vision tower's inputs for some pictures of one prompt."""
        text = self.wrapped_token * len(pictures)
        made = self._processed(text, pictures, add_special_tokens=False)
        return {
            key: torch.as_tensor(value)
            for key, value in made.items()
            if key not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        }

    def _processed(
        self, text: str, pictures: Sequence[Picture], *, add_special_tokens: bool
    ) -> Mapping[str, Any]:
        images = [picture.image() for picture in pictures]
        try:
            return self.processor(
                text=[text],
                images=[images],
                add_special_tokens=add_special_tokens,
                return_tensors="pt",
            )
        except (ValueError, TypeError, IndexError) as error:
            names = ", ".join(picture.name or "a picture" for picture in pictures)
            raise UserError(
                f"the processor of {self.name!r} cannot take {names} ({first_line(error)}); change "
                "the picture, or use another model."
            ) from None

    # --- from pixels to what the language part reads ----------------------------------------------

    def inputs(
        self, model: PreTrainedModel, ids: Tensor, prompts: Sequence[Sequence[int]], start: Any
    ) -> dict[str, Any]:
        """Return the further inputs of a forward pass over `ids`; empty without pictures.

        `ids` [row, token] have the prompts from column `start[row]` on, then the completion, and
        padding elsewhere.
        """
        if not any(map(pictures_of, prompts)):
            return {}
        self._require_placeholders_of_pictures(ids, prompts)
        sights: dict[Sequence[int], Sight] = {}
        for prompt in prompts:
            if pictures_of(prompt) and prompt not in sights:
                sights[prompt] = self.sight(model, prompt)
        rows = [sights[prompt] for prompt in prompts if pictures_of(prompt)]
        inputs: dict[str, Any] = {"mm_encoder_outputs": {"image": _joined(rows)}}
        if any(sight.positions is not None for sight in rows):
            positions = torch.zeros(3, *ids.shape, dtype=torch.long)
            for row, prompt in enumerate(prompts):
                sight = sights.get(prompt) if pictures_of(prompt) else None
                own = positions_of(prompt, sight, ids.shape[1] - start[row])
                positions[:, row, start[row] :] = own
            inputs["position_ids"] = positions.to(ids.device)
        return inputs

    def _require_placeholders_of_pictures(
        self, ids: Tensor, prompts: Sequence[Sequence[int]]
    ) -> None:
        """Raise `UserError` if a row has the placeholder of a picture that its prompt does not
        have. This can happen in a completion written by another program."""
        token = getattr(self.config, "image_token_id", -1)
        found = (ids == token).sum(dim=1).tolist()
        wanted = [list(one).count(token) if pictures_of(one) else 0 for one in prompts]
        if found != wanted:
            raise UserError(
                "a completion, or a text without pictures, holds "
                f"{self.tokenizer.convert_ids_to_tokens(token)!r}, in whose place {self.name!r} "
                "reads a picture; take it out of what is trained on or scored."
            )

    def sight(self, model: PreTrainedModel, prompt: Sequence[int]) -> Sight:
        """Return the features of a prompt with pictures; they are computed only once if kept."""
        assert isinstance(prompt, PicturedPrompt)
        if kept := self._kept.get(prompt):
            self._kept.move_to_end(prompt)
            return kept
        # Sampling runs in inference mode, whose tensors cannot be used with gradients, but kept
        # features must work in both.
        # A blackened picture is used only once.
        if not self.keeps_features or any(one.blackened for one in prompt.pictures):
            return self._look(model, prompt)
        with torch.inference_mode(False), torch.no_grad():
            sight = self._look(model, prompt)
        self._kept[prompt] = sight
        while sum(one.num_bytes for one in self._kept.values()) > MAX_KEPT_BYTES:
            self._kept.popitem(last=False)
        return sight

    def _look(self, model: Any, prompt: PicturedPrompt) -> Sight:
        below = model.base_model
        pixels = {
            key: value.to(model.device) for key, value in self.pixels(prompt.pictures).items()
        }
        taken = inspect.signature(below.get_image_features).parameters
        wanted = {key: value for key, value in pixels.items() if key in taken}
        outputs = below.get_image_features(**wanted, return_dict=True)
        # The states of the tower's layers, which some models return too, are not needed again.
        needed = {name: outputs[name] for name in _FEATURES if outputs.get(name) is not None}
        positions = _positions(below, prompt, pixels, self.config)
        size = _num_bytes(list(needed.values()))
        grids = pixels.get("image_grid_thw")
        sight = Sight(type(outputs)(**needed), positions, grids, size)
        if not self._is_compared:
            self._require_own_states(below, prompt, pixels, sight)
            self._is_compared = True
        return sight

    @torch.no_grad()
    def _require_own_states(
        self, below: Any, prompt: PicturedPrompt, pixels: dict[str, Tensor], sight: Sight
    ) -> None:
        """Raise `UserError` unless precomputed features have the same effect as pixels.

        Some architectures need more inputs, such as which tokens attend to each other both ways.
        """
        ids = torch.tensor([list(prompt)], device=below.device)
        kinds = (ids == getattr(self.config, "image_token_id", -1)).int()
        taken = inspect.signature(below.forward).parameters
        own = {name: kinds for name in ("token_type_ids", "mm_token_type_ids") if name in taken}
        given: dict[str, Any] = {"mm_encoder_outputs": {"image": _joined([sight])}}
        if sight.positions is not None:
            given["position_ids"] = sight.positions[:, None].to(ids.device)
        read = partial(below, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        theirs = read(**pixels, **own).last_hidden_state.float()
        try:
            ours = read(**given).last_hidden_state.float()
        except (AttributeError, TypeError, ValueError, KeyError):
            difference = float("inf")
        else:
            difference = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
        if not difference <= _MOST_DIFFERENCE:
            raise UserError(
                f"{type(below).__name__} of {self.name!r} does not read features of pictures "
                "computed beforehand as it reads pixels; use another model, such as LLaVA, "
                "SmolVLM, Qwen2-VL or Qwen3-VL."
            )


def positions_of(prompt: Sequence[int], sight: Sight | None, length: int) -> Tensor:
    """Return the positions [3, length] of a prompt's tokens and of the tokens after it."""
    if sight is None or sight.positions is None:
        return torch.arange(length).expand(3, -1)
    first = int(sight.positions.max()) + 1
    after = torch.arange(first, first + max(length - len(prompt), 0))
    return torch.cat([sight.positions, after.expand(3, -1)], dim=1)[:, :length]


def _positions(
    below: Any, prompt: PicturedPrompt, pixels: dict[str, Tensor], config: PretrainedConfig
) -> Tensor | None:
    """Return the positions of a prompt's tokens with M-RoPE; None for a model without it."""
    find: Callable[..., Any] | None = getattr(below, "get_rope_index", None)
    if find is None:
        return None
    ids = torch.tensor([list(prompt)])
    grids = {key: value.cpu() for key, value in pixels.items() if key.endswith("_grid_thw")}
    kinds = (ids == getattr(config, "image_token_id", -1)).int()
    taken = inspect.signature(find).parameters
    if "mm_token_type_ids" in taken:
        grids["mm_token_type_ids"] = kinds
    return find(input_ids=ids, attention_mask=torch.ones_like(ids), **grids)[0][:, 0].cpu()


def _num_bytes(features: Any) -> int:
    """Count the bytes of tensors in lists."""
    if isinstance(features, Tensor):
        return features.numel() * features.element_size()
    return sum(map(_num_bytes, features))


def _joined(sights: Sequence[Sight]) -> Any:
    """Join the features of several prompts, in the order of their rows."""
    first = sights[0].outputs
    pooled = [s.outputs.pooler_output for s in sights]
    # One tensor of all pictures, or one of each, as the model makes and takes them.
    is_tensor = isinstance(pooled[0], Tensor)
    joined = {
        "pooler_output": torch.cat(pooled) if is_tensor else [one for s in pooled for one in s]
    }
    layers = getattr(first, "deepstack_features", None)
    if layers is not None:
        # Of each layer, the features of each picture.
        joined["deepstack_features"] = [
            [one for s in sights for one in s.outputs.deepstack_features[layer]]
            for layer in range(len(layers))
        ]
    return type(first)(**joined)


def require_seeing_class(model: Any) -> None:
    """Raise `UserError` for an architecture that does not take precomputed features."""
    taken = inspect.signature(model.base_model.forward).parameters
    if "mm_encoder_outputs" not in taken:
        raise UserError(
            f"{type(model).__name__} takes no features of pictures computed beforehand in this "
            "version of transformers; take a model such as LLaVA, SmolVLM, Qwen2-VL or Qwen3-VL, "
            "with transformers 5.19 or later."
        )


def seen(
    language_model: Any, ids: Tensor, prompts: Sequence[Sequence[int]], start: Any
) -> dict[str, Any]:
    """Return the model's inputs for the prompts' pictures; see `Vision.inputs`.

    Raises `UserError` if it reads only text.
    """
    if language_model.vision is not None:
        return language_model.vision.inputs(language_model.model, ids, prompts, start)
    require_blind_prompts(prompts, language_model.name)
    return {}
