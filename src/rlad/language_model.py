"""Loading a causal language model with its tokenizer, from the embedded pair, a folder or a Hugging Face name."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = {
    name: Path(__file__).parent / "models" / name.removeprefix("embedded/") for name in ("embedded/student", "embedded/teacher")
}


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model in evaluation mode without dropout, its tokenizer, and the tokens that end a completion."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    compute_dtype: torch.dtype
    """of the forward pass; narrower than the weights for a student that trains in bfloat16"""

    def autocast(self) -> AbstractContextManager[Any]:
        """Runs the forward pass in `compute_dtype` where the weights are wider."""
        if self.compute_dtype == self.model.dtype:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.compute_dtype)

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence the model was made for; None when it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def pick_device(device: str) -> torch.device:
    """The torch device for a `device` setting; `auto` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:0.") from None
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for but this machine has no usable GPU; use device = 'auto' or 'cpu'.")
    return picked


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `ValueError` when there is none or it cannot be loaded."""
    path = EMBEDDED.get(name, name)
    _must_be_a_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"no tokenizer can be loaded from {name!r} ({_first_line(error)}); a model folder needs tokenizer.json or the "
            "tokenizer files of its family: save the tokenizer beside the model with `tokenizer.save_pretrained(folder)`."
        ) from None
    if not len(tokenizer):
        raise ValueError(f"the tokenizer of {name!r} is empty; save the right one with `tokenizer.save_pretrained(folder)`.")
    return tokenizer


def load_language_model(name: str, *, dtype: str = "float32", device: str = "auto", trainable: bool = False) -> LanguageModel:
    """The model and its tokenizer, ready to sample and score. `ValueError` with one sentence when that cannot be.

    A `trainable` model keeps float32 weights and only computes in `dtype`: the small updates of RL vanish in bfloat16 weights.
    """
    tokenizer, where, compute_dtype = load_tokenizer(name), pick_device(device), getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            EMBEDDED.get(name, name), dtype=torch.float32 if trainable else compute_dtype, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"no causal language model can be loaded from {name!r} ({_first_line(error)}); give a Hugging Face name, "
            "or a folder with config.json and model.safetensors."
        ) from None
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ValueError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens but the model only "
            f"{model.get_input_embeddings().weight.shape[0]} embeddings; this tokenizer belongs to another model."
        )
    _remove_dropout(model)
    eos = _eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    return LanguageModel(name, model.to(where).eval(), tokenizer, eos, pad, compute_dtype)


def context_tokens(name: str) -> int | None:
    """The context length that a model's config states, without loading its weights."""
    _must_be_a_model(name)
    config = AutoConfig.from_pretrained(EMBEDDED.get(name, name))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _must_be_a_model(name: str) -> None:
    if name.startswith("embedded/") and name not in EMBEDDED:
        raise ValueError(f"model {name!r} is unknown; the embedded models are {', '.join(EMBEDDED)}.")
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    if name not in EMBEDDED and looks_like_a_path and not (Path(name) / "config.json").is_file():
        what = "has no config.json" if Path(name).is_dir() else "is not a folder"
        raise ValueError(f"model {name!r} {what}; give a Hugging Face name, or a folder that `save_pretrained` wrote.")


def _remove_dropout(model: PreTrainedModel) -> None:
    """Old, student and teacher log-probs must come from one function; dropout would make it another one each time."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end token that the model or its tokenizer declares (chat models have more than one)."""
    declared = getattr(model.generation_config, "eos_token_id", None) or model.config.eos_token_id
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(f"model {model.name_or_path!r} declares no end token; set `eos_token` in its tokenizer.")
    return tuple(ids)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
