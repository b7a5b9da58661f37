"""Loading and saving a causal language model with its tokenizer, by its name: embedded, packaged, a
folder (of an adapter too), or a Hugging Face name."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlad.config.run import LoraConfig
from rlad.errors import UserError
from rlad.models.adapters import add_lora, has_adapter, load_adapter, save_adapter
from rlad.models.files import (
    EMBEDDED,
    base_model,
    files_of,
    has_tokenizer,
    is_adapter,
    located,
    require_peft,
)

# What transformers raises for files that are not what they should be.
_UNUSABLE_FILES = (OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A model in evaluation mode without dropout, its tokenizer, and the tokens that end a
    completion."""

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
    def vocabulary(self) -> int:
        """How many token ids the model knows; padding can make them more than the tokenizer's."""
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.shape[0]

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence the model was made for; None when it does not say."""
        return context_tokens(self.model.config)


# --- without weights ------------------------------------------------------------------------------


def pick_device(device: str) -> torch.device:
    """Return the torch device of a `device` setting; `auto` is the GPU where there is one.

    Raises `UserError` when it cannot be used.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.empty(0, device=device).device
        reason = "models are computed on cpu, cuda, mps"
    except (RuntimeError, AssertionError) as error:
        picked = None
        reason = _first_line(error)
    if picked is None or picked.type not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"device {device!r} cannot be used on this machine ({reason}); use 'auto', 'cpu', or "
            "for a GPU 'cuda' or 'cuda:0'."
        )
    return picked


def load_model_config(name: str) -> PretrainedConfig:
    """Load a model's config, of an adapter that of its base model.

    Raises `UserError` when `name` is no model.
    """
    base = base_model(name)
    if base.startswith("embedded/") and base not in EMBEDDED:
        raise UserError(
            f"model {base!r} is unknown; the embedded models are {', '.join(EMBEDDED)}."
        )
    where = located(base)
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except _UNUSABLE_FILES as error:
        _refuse_code(base, error)
        what = f"model {base!r}"
        if base != name:
            what += f", the base model of adapter {name!r},"
        raise UserError(
            f"{what} cannot be found or read ({_first_line(error)}); give a folder that "
            "`save_pretrained` wrote, or a Hugging Face name that is in the cache or can be "
            "downloaded."
        ) from None


def load_generation_config(name: str) -> GenerationConfig | None:
    """Load a model's `generation_config.json`, which may name end tokens; None without one."""
    try:
        return GenerationConfig.from_pretrained(str(files_of(name)))
    except OSError:
        return None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, of an adapter its own where it has one.

    Raises `UserError` when there is none or it cannot be loaded.
    """
    load_model_config(name)
    where = name if has_tokenizer(name) else files_of(name)
    tokenizer: Any = None
    problem = "it is empty"
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except _UNUSABLE_FILES as error:
        _refuse_code(name, error)
        problem = _first_line(error)
    if not tokenizer:  # none, or one of no tokens
        raise UserError(
            f"no tokenizer can be loaded from {name!r} ({problem}); a model folder needs "
            "tokenizer.json or the tokenizer files of its family: save the tokenizer beside the "
            "model with `tokenizer.save_pretrained(folder)`."
        )
    return tokenizer


def context_tokens(config: Any) -> int | None:
    """Return the longest sequence a model was made for; None when its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def end_token_ids(
    config: Any, generation: Any, tokenizer: Any, more: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return every end token that a model or its tokenizer declares (chat models have more than
    one), and `more`.

    Raises `UserError` without any, and for one that the tokenizer does not know.
    """
    declared = getattr(generation, "eos_token_id", None)
    if declared is None:
        declared = getattr(config.get_text_config(), "eos_token_id", None)
    # One number or a list, and then the tokenizer's own.
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    if isinstance(tokenizer.eos_token_id, int):
        ids.append(tokenizer.eos_token_id)
    ids += [token_id(tokenizer, token, "student.end_tokens") for token in more]
    if not ids:
        raise UserError(
            f"model {tokenizer.name_or_path!r} declares no end token; set `eos_token` in its "
            "tokenizer."
        )
    return tuple(dict.fromkeys(ids))


def token_id(tokenizer: Any, token: str, setting: str) -> int:
    """Return the id of one token by its string. Raises `UserError` when there is no such token."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise UserError(
            f"{setting} names {token!r}, which is no single token of {tokenizer.name_or_path!r}; "
            "correct it."
        )
    return found


# --- with weights ---------------------------------------------------------------------------------


def load_language_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    trainable: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
    random_weights_seed: int | None = None,
    quantization: Any = None,
    end_tokens: Sequence[str] = (),
) -> LanguageModel:
    """Load a model and its tokenizer, ready to sample and score.

    A `trainable` model keeps float32 weights and only computes in `dtype`: the small updates of RL
    vanish in bfloat16 weights. With `lora` it gets an adapter, drawn from `seed`, whose float32
    weights are trained instead; its own are then in `dtype`. The folder of an adapter is loaded
    with its base model, the same way. With `random_weights_seed` the weights are drawn anew, by
    the model's own initialisation. `quantization` is transformers' `quantization_config`.
    `end_tokens` end a completion besides those that the model declares, and are saved with it.
    Raises `UserError` when the model cannot be loaded.
    """
    # Mistakes in names and settings show before gigabytes are read.
    tokenizer = load_tokenizer(name)
    where = pick_device(device)
    compute_dtype = getattr(torch, dtype)
    if random_weights_seed is None:
        weights_are_trained = trainable and not lora and not is_adapter(name)
        weights_dtype = torch.float32 if weights_are_trained else compute_dtype
        model = _load_weights(name, weights_dtype, quantization, where)
    else:
        # A control: the same architecture with weights that know nothing.
        with torch.random.fork_rng():
            torch.manual_seed(random_weights_seed)
            model = AutoModelForCausalLM.from_config(load_model_config(name), dtype=compute_dtype)
    if lora:
        require_peft("[student.lora]")
        add_lora(model, lora, base=name, seed=seed)
    if trainable:
        _require_finite(name, model)
    if where.type == "cpu":
        # Each weight gets aligned memory of its own: the last bits of a product depend on where
        # in their file the weights were.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    remove_dropout(model)
    # End tokens of the run are written with the model, so that others stop at them too.
    eos = end_token_ids(model.config, model.generation_config, tokenizer, end_tokens)
    if end_tokens and model.generation_config is not None:
        model.generation_config.eos_token_id = list(eos)
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else eos[0]
    loaded = LanguageModel(name, model.to(where).eval(), tokenizer, eos, pad, compute_dtype)
    if len(tokenizer) > loaded.vocabulary:
        raise UserError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens but the model only "
            f"{loaded.vocabulary} embeddings; this tokenizer belongs to another model."
        )
    return loaded


def _load_weights(name: str, dtype: torch.dtype, quantization: Any, device: torch.device) -> Any:
    if is_adapter(name):
        require_peft(f"adapter {name!r}")
        model = _load_weights(base_model(name), dtype, quantization, device)
        load_adapter(model, name)
        return model
    settings: dict[str, Any] = {}
    if quantization is not None:
        # Quantised where it is to work: some kernels pack their weights on the GPU alone.
        settings = {"quantization_config": quantization, "device_map": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            located(name),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **settings,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        _refuse_code(name, error)
        raise UserError(
            f"no causal language model can be loaded from {name!r} ({_first_line(error)}); give a "
            "Hugging Face name, or a folder with config.json and model.safetensors."
        ) from None
    # transformers draws missing tensors at random and only warns.
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the weights of {name!r} lack {len(missing)} tensors of a causal language model, the "
            f"first is {missing[0]!r}; give a complete model."
        )
    return model


def save_model(language_model: LanguageModel, folder: Path) -> None:
    """Write weights and tokenizer as `AutoModelForCausalLM.from_pretrained` and
    `AutoTokenizer.from_pretrained` read them; of a LoRA student the adapter alone, as PEFT reads
    it.
    """
    if has_adapter(language_model.model):
        save_adapter(language_model.model, folder)
    else:
        language_model.model.save_pretrained(folder)
    try:
        language_model.tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # all that the tokenizers package says when the disk is full
            raise OSError(str(error)) from None
        raise


def remove_dropout(model: PreTrainedModel) -> None:
    """Disable dropout: old, student and teacher log-probs must come from one function.

    So must the noise that some mixtures of experts put on their router in training mode.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def _require_finite(name: str, model: PreTrainedModel) -> None:
    for weight, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"weight {weight!r} of {name!r} holds NaN or infinite values; give a model that is "
                "whole."
            )


def _refuse_code(name: str, error: Exception) -> None:
    """Raise `UserError` for a model that wants to run Python code of its own, which rlad never
    does."""
    if "trust_remote_code" in str(error):
        raise UserError(
            f"model {name!r} comes with Python code of its own, which rlad does not run; take a "
            "model whose architecture and tokenizer transformers has itself."
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
