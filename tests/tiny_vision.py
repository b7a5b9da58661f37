"""Tiny random models that see, of three layouts, with processors made from an in-memory
tokenizer."""

import random
from functools import cache
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from rlad.models.grid_processor import GridProcessor
from rlad.models.loading import LanguageModel, remove_dropout
from rlad.models.pictures import Picture
from rlad.models.vision import Vision
from rlad.tasks import Problem
from rlad.tasks.base import judged

FAMILIES = ("llava", "idefics3", "qwen2_vl", "qwen3_vl")
PAD, EOS = 0, 1
_SPECIAL = (
    "<pad>", "<eos>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
)  # fmt: skip
VOCABULARY = 64
TAGS = ("<perception>", "</perception>", "<reasoning>", "</reasoning>")
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_QWEN_EYES: dict[str, Any] = {
    "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip


def seeing_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w10` to `w59`, split at white space, the tags of roles, and the special tokens of all
    families."""
    num_words = VOCABULARY - len(TAGS)
    words = [*_SPECIAL, *(f"w{i}" for i in range(len(_SPECIAL), num_words)), *TAGS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w10"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": list(_SPECIAL[2:])})
    return made


def _id(token: str) -> int:
    return _SPECIAL.index(token)


def _config(family: str, head_dim: int) -> Any:
    text: dict[str, Any] = _TEXT | {
        "head_dim": head_dim,
        "num_attention_heads": 32 // head_dim,
        "num_key_value_heads": max(16 // head_dim, 1),
    }
    third = head_dim // 6
    sections: dict[str, Any] = {"mrope_section": [head_dim // 2 - 2 * third, third, third]}
    image = {"image_token_id": _id("<image>")}
    qwen = {
        "image_token_id": _id("<|image_pad|>"),
        "video_token_id": _id("<|video_pad|>"),
        "vision_start_token_id": _id("<|vision_start|>"),
        "vision_end_token_id": _id("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "llava":
        return LlavaConfig(
            text_config={"model_type": "qwen3", **text},
            vision_config={"model_type": "siglip_vision_model", **_EYES},
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            tie_word_embeddings=False,
            **image,
        )
    if family == "idefics3":
        return Idefics3Config(
            text_config={"model_type": "llama", **text},
            vision_config=dict(_EYES),
            scale_factor=2,
            pad_token_id=PAD,
            tie_word_embeddings=False,
            **image,
        )
    if family == "qwen2_vl":
        return Qwen2VLConfig(
            text_config=text | {"rope_parameters": rope | sections},
            vision_config=_QWEN_EYES | {"mlp_ratio": 2},
            **qwen,
        )
    deep = {"deepstack_visual_indexes": [0, 1], "out_hidden_size": 32, "intermediate_size": 64}
    mrope = sections | {"mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope | mrope},
        vision_config=_QWEN_EYES | deep | {"num_position_embeddings": 64},
        **qwen,
    )


_MODELS = {
    "llava": LlavaForConditionalGeneration,
    "idefics3": Idefics3ForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}


def tiny_processor(family: str, tokenizer: Any = None) -> Any:
    tokenizer = tokenizer or seeing_tokenizer()
    if family == "llava":
        images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        return LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="full"
        )
    if family == "idefics3":
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 32},
            max_image_size={"longest_edge": 32},
            do_image_splitting=False,
        )
        return Idefics3Processor(images, tokenizer, image_seq_len=4)
    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=48 * 48
    )
    return GridProcessor(images, tokenizer, "<|image_pad|>")


@cache
def _weights(family: str, seed: int, head_dim: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _MODELS[family](_config(family, head_dim))
        with torch.no_grad():
            for parameter in model.parameters():
                # Large weights: what a token sees changes its probabilities.
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.state_dict()


def tiny_seeing_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, head_dim: int = 8
) -> LanguageModel:
    """A random model of a family whose distributions depend on what it sees."""
    model = _MODELS[family](_config(family, head_dim))
    model.load_state_dict(_weights(family, seed, head_dim))
    remove_dropout(model)
    model = model.to(dtype).eval()
    tokenizer = seeing_tokenizer()
    vision = Vision(f"tiny-{family}", "", tokenizer, model.config)
    vision.processor = tiny_processor(family, tokenizer)
    return LanguageModel(f"tiny-{family}", model, tokenizer, (EOS,), PAD, dtype, vision)


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Picture:
    """Coloured noise."""
    draw = random.Random(seed)
    pixels = bytes(draw.randrange(256) for _ in range(3 * size[0] * size[1]))
    return Picture.from_pil(Image.frombytes("RGB", size, pixels), f"picture {seed}")


class Looking:
    """A task of one or two pictures; a completion is right when it has an even number of different
    words."""

    name = "looking"

    def problem(self, split: str, index: int, *, seed: int = 0) -> Problem:
        number = 1 + index % 2
        pictures = tuple(picture(7 * index + n, ((32, 32), (48, 32))[n]) for n in range(number))
        return Problem("<image>" * number + f" w2{index % 10}", "w12", str(index), images=pictures)

    def num_problems(self, split: str) -> None:
        return None

    def judge(self, problem: Problem, completion: str) -> Any:
        return judged(len(set(completion.split())) % 2 == 0)

    def close(self) -> None:
        pass
