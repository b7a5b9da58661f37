"""Shapes of published models, so that a run can be planned before anything is downloaded.

The numbers are from the models' own config.json. Models with the same `tokenizer` have the same
token ids, so one can teach the other.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlad.errors import UserError
from rlad.text import nearest


@dataclass(frozen=True, slots=True)
class Family:
    """The properties that models with one tokenizer share."""

    model_type: str
    architecture: str
    vocabulary: int
    context: int
    end_token: str
    """end token of a turn in the chat models; base models end with another one"""
    is_chat: str
    """suffix of the chat models' names; "" if instead the base models have one"""
    teacher: str
    """a chat model that teaches the smaller ones"""
    pause: str = ""
    """variables of the chat template that turn long thinking off"""


FAMILIES = {
    "Qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        151_936,
        40_960,
        "<|im_end|>",
        "",
        "Qwen/Qwen3-8B",
        "{ enable_thinking = false }",
    ),
    "Llama 3": Family(
        "llama",
        "LlamaForCausalLM",
        128_256,
        131_072,
        "<|eot_id|>",
        "-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    "Gemma 3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        262_144,
        32_768,
        "<end_of_turn>",
        "-it",
        "google/gemma-3-4b-it",
    ),
    "SmolLM2": Family(
        "llama",
        "LlamaForCausalLM",
        49_152,
        8_192,
        "<|im_end|>",
        "-Instruct",
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    ),
}

# Family, names of the chat and of the base model; layers, hidden size, size of the MLP, heads,
# key-value heads, head size; whether the output layer is the embeddings.
_ROWS: list[tuple[str, str, str, tuple[int, ...], bool]] = [
    ("Qwen3", "Qwen/Qwen3-0.6B", "-Base", (28, 1024, 3072, 16, 8, 128), True),
    ("Qwen3", "Qwen/Qwen3-1.7B", "-Base", (28, 2048, 6144, 16, 8, 128), True),
    ("Qwen3", "Qwen/Qwen3-4B", "-Base", (36, 2560, 9728, 32, 8, 128), True),
    ("Qwen3", "Qwen/Qwen3-8B", "-Base", (36, 4096, 12288, 32, 8, 128), False),
    ("Qwen3", "Qwen/Qwen3-14B", "-Base", (40, 5120, 17408, 40, 8, 128), False),
    ("Qwen3", "Qwen/Qwen3-32B", "", (64, 5120, 25600, 64, 8, 128), False),
    ("Llama 3", "meta-llama/Llama-3.2-1B", "", (16, 2048, 8192, 32, 8, 64), True),
    ("Llama 3", "meta-llama/Llama-3.2-3B", "", (28, 3072, 8192, 24, 8, 128), True),
    ("Llama 3", "meta-llama/Llama-3.1-8B", "", (32, 4096, 14336, 32, 8, 128), False),
    ("Llama 3", "meta-llama/Llama-3.1-70B", "", (80, 8192, 28672, 64, 8, 128), False),
    ("Gemma 3", "google/gemma-3-270m", "", (18, 640, 2048, 4, 1, 256), True),
    ("Gemma 3", "google/gemma-3-1b", "-pt", (26, 1152, 6912, 4, 1, 256), True),
    ("Gemma 3", "google/gemma-3-4b", "-pt", (34, 2560, 10240, 8, 4, 256), True),
    ("Gemma 3", "google/gemma-3-12b", "-pt", (48, 3840, 15360, 16, 8, 256), True),
    ("Gemma 3", "google/gemma-3-27b", "-pt", (62, 5376, 21504, 32, 16, 128), True),
    ("SmolLM2", "HuggingFaceTB/SmolLM2-135M", "", (30, 576, 1536, 9, 3, 64), True),
    ("SmolLM2", "HuggingFaceTB/SmolLM2-360M", "", (32, 960, 2560, 15, 5, 64), True),
    ("SmolLM2", "HuggingFaceTB/SmolLM2-1.7B", "", (24, 2048, 8192, 32, 32, 64), True),
]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published model: its family and shape."""

    name: str
    tokenizer: str
    is_chat: bool
    shape: tuple[int, ...]
    is_tied: bool

    @property
    def family(self) -> Family:
        return FAMILIES[self.tokenizer]

    @property
    def layers(self) -> int:
        return self.shape[0]

    @property
    def key_size(self) -> int:
        """The count of numbers in the keys of one token and layer."""
        return self.shape[4] * self.shape[5]

    @property
    def widths_of_linear_layers(self) -> int:
        """The sum of inputs and outputs of all linear layers but the last, which is the number of
        weights of an adapter of rank 1."""
        layers, hidden, mlp, heads, _, head_size = self.shape
        queries = heads * head_size
        attention = 2 * (hidden + queries) + 2 * (hidden + self.key_size)
        return layers * (attention + 3 * (hidden + mlp))

    @property
    def has_chat_template(self) -> bool:
        # Of the base models only Qwen's come with one.
        return self.is_chat or self.tokenizer == "Qwen3"

    def write_config(self, folder: Path) -> str:
        """Write a config.json with the model's own values, without weights; return the folder."""
        names = ("num_hidden_layers", "hidden_size", "intermediate_size")
        names += ("num_attention_heads", "num_key_value_heads", "head_dim")
        config: dict[str, Any] = dict(zip(names, self.shape, strict=True)) | {
            "architectures": [self.family.architecture],
            "model_type": self.family.model_type,
            "vocab_size": self.family.vocabulary,
            "max_position_embeddings": self.family.context,
            "tie_word_embeddings": self.is_tied,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)


def _models() -> dict[str, KnownModel]:
    found = {}
    for tokenizer, name, base, shape, is_tied in _ROWS:
        chat = name + FAMILIES[tokenizer].is_chat
        for model, is_chat in ((name + base, False), (chat, True)):
            found[model] = KnownModel(model, tokenizer, is_chat, shape, is_tied)
    return found


MODELS = _models()


def known_pair(student: str, teacher: str | None) -> tuple[KnownModel, KnownModel]:
    """Find a student and its teacher, by default its family's. Raises `UserError` for an unknown
    name, and for different tokenizers."""
    learner = _known(student, "--student")
    guide = _known(teacher or learner.family.teacher, "--teacher")
    if learner.tokenizer != guide.tokenizer:
        raise UserError(
            f"{guide.name} has the tokenizer of {guide.tokenizer} and {learner.name} that of "
            f"{learner.tokenizer}, so it cannot score the student's tokens; use a teacher of the "
            f"same family, such as {learner.family.teacher}."
        )
    return learner, guide


def _known(name: str, option: str) -> KnownModel:
    if name in MODELS:
        return MODELS[name]
    meant = nearest(name, MODELS)
    raise UserError(
        f"{option} {name} is not one of the models whose shape rlad knows; "
        + (f"{meant} Else take " if meant else "take ")
        + f"one of the families {', '.join(FAMILIES)} (`rlad init --models` lists them), and write "
        "another name into the file afterwards."
    )
