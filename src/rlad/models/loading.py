"""Load and save a causal language model with its tokenizer by name: embedded, packaged, a folder
(also an adapter's), or a Hugging Face name."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlad.config.run import LoraConfig
from rlad.errors import UserError, require_package
from rlad.models.adapters import add_lora, has_adapter, load_adapter, save_adapter
from rlad.models.files import base_model, files_of, is_adapter, located
from rlad.models.language_part import freeze_vision
from rlad.models.rope import longest_with_one_rope
from rlad.models.vision import Vision, auto_class, require_seeing_class, sees
from rlad.models.without_weights import (
    TOKENS_OF_GENERATION,
    context_tokens,
    end_token_ids,
    load_generation_config,
    load_model_config,
    load_tokenizer,
    unusable,
)
from rlad.text import first_line

_MORE_THAN_LOGITS = ("output_router_logits", "output_hidden_states", "output_attentions")


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
    """data type of the forward pass; narrower than the weights if a student trains in bfloat16"""
    vision: Vision | None = None
    """the picture processor of a vision model"""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context that runs the forward pass in `compute_dtype` if the weights are
        wider."""
        if self.compute_dtype == self.model.dtype:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.compute_dtype)

    @property
    def vocabulary(self) -> int:
        """The number of token ids of the model; with padding there may be more than in the
        tokenizer."""
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.shape[0]

    def can_read(self, completion: Sequence[int]) -> bool:
        """Return whether a completion by another model has only tokens that this one knows, and no
        placeholder of a picture."""
        return max(completion) < self.vocabulary and not set(self.never_written) & set(completion)

    @property
    def never_written(self) -> tuple[int, ...]:
        """The placeholder tokens of pictures, films and sound."""
        return self.vision.placeholder_ids if self.vision else ()

    @property
    def context_tokens(self) -> int | None:
        """The longest sequence that the model supports; None if it does not state it."""
        return context_tokens(self.model.config)

    def require_one_rope(self, num_tokens: int) -> None:
        """Raise `UserError` for a sequence in which a token's log-prob would depend on later tokens
        or on other sequences."""
        longest = longest_with_one_rope(self.model.config)
        if longest is not None and num_tokens > longest:
            raise UserError(
                f"a sequence of {num_tokens} tokens is more than the {longest} up to which the "
                f"positions of {self.name!r} have one meaning (beyond it, its rope_parameters "
                "make log-probs depend on the longest sequence in the batch); lower "
                "rollout.max_completion_tokens, or use shorter prompts."
            )


def pick_device(device: str) -> torch.device:
    """Return the torch device of a `device` setting; `auto` is the GPU if there is one.

    Raises `UserError` if it cannot be used.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.zeros(1, device=device)
        picked.tolist()  # fails on "meta", where tensors have no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device!r} cannot be used on this machine ({first_line(error)}); use 'auto', "
            "'cpu', or for a GPU 'cuda' or 'cuda:0'."
        ) from None
    return picked.device


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
    train_vision: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer, ready to sample and score.

    A `trainable` model keeps float32 weights and only computes in `dtype`, since the small updates
    of RL are lost in bfloat16 weights. With `lora` it gets an adapter, drawn from `seed`, whose
    float32 weights are trained instead; its own are then in `dtype`. The folder of an adapter is
    loaded with its base model in the same way. With `random_weights_seed` the weights are drawn by
    the model's own initialisation. `quantization` is transformers' `quantization_config`.
    `end_tokens` end a completion besides those that the model declares, and are saved with it. In a
    trainable vision model only the language part is trained, or all of it with `train_vision`.
    Raises `UserError` if the model cannot be loaded.
    """
    # Find mistakes in names and settings before gigabytes are read.
    tokenizer = load_tokenizer(name)
    where = pick_device(device)
    compute_dtype = getattr(torch, dtype)
    load_generation_config(name)  # transformers silently ignores a damaged one
    if random_weights_seed is None:
        weights_are_trained = trainable and not lora and not is_adapter(name)
        weights_dtype = torch.float32 if weights_are_trained else compute_dtype
        model = _load_weights(name, weights_dtype, quantization, where)
    else:
        # For control experiments: the same architecture with untrained weights.
        with torch.random.fork_rng():
            torch.manual_seed(random_weights_seed)
            config = load_model_config(name)
            model = auto_class(config).from_config(config, dtype=compute_dtype)
    if lora:
        require_package("peft", "[student.lora]")
        add_lora(model, lora, base=name, seed=seed)
    if where.type == "cpu":
        # Each weight gets aligned memory of its own: the last bits of a product depend on where
        # in their file the weights were.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    remove_dropout(model)
    _return_logits_alone(model)
    vision = _vision(name, model, tokenizer)
    if trainable:
        _describe_truly(model)
        if vision is not None and not train_vision:
            freeze_vision(model)
    # The run's end tokens are saved with the model, so that other programs stop at them too.
    eos = end_token_ids(model.config, model.generation_config, tokenizer, end_tokens)
    if end_tokens and model.generation_config is not None:
        model.generation_config.eos_token_id = list(eos)
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else eos[0]
    if vision is not None:
        vision.keeps_features = not (trainable and train_vision)
    loaded = LanguageModel(name, model.to(where).eval(), tokenizer, eos, pad, compute_dtype, vision)
    _require_sound(loaded, look_at_weights=trainable)
    return loaded


def _return_logits_alone(model: Any) -> None:
    """Undo settings of a config.json that make a forward pass return more than logits, or a tuple.

    One is `output_router_logits` of a mixture of experts: its auxiliary loss is not part of any
    objective.
    """
    for config in (model.config, model.config.get_text_config()):
        for setting in _MORE_THAN_LOGITS:
            if getattr(config, setting, False):
                setattr(config, setting, False)
        config.return_dict = True


def _vision(name: str, model: Any, tokenizer: Any) -> Vision | None:
    if not sees(model.config):
        return None
    require_seeing_class(model)
    return Vision(name, files_of(name), tokenizer, model.config)


def _describe_truly(model: Any) -> None:
    """Make the configs, which are saved in checkpoints and exports, describe the trained model.

    Generation settings other than tokens (repetition_penalty, top_k, ...) are not used and are
    removed. A model with a separate output layer may declare tied embeddings; programs that rely on
    it, such as vLLM, would drop that layer.
    """
    own = model.generation_config
    if own is not None:
        tokens = {key: getattr(own, key) for key in TOKENS_OF_GENERATION}
        model.generation_config = GenerationConfig(**tokens)
    output = model.get_output_embeddings()
    is_tied = output is not None and output.weight is model.get_input_embeddings().weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = is_tied


def _require_sound(loaded: LanguageModel, *, look_at_weights: bool) -> None:
    """Raise `UserError` for a tokenizer of another model, and for weights that are not finite."""
    num_tokens = len(loaded.tokenizer)
    problem = ""
    if num_tokens > loaded.vocabulary:
        problem = (
            f"its tokenizer has {num_tokens} tokens but the model only {loaded.vocabulary} "
            "embeddings, so it belongs to another model"
        )
    elif look_at_weights:
        weights = loaded.model.named_parameters()
        wrong = next((key for key, weight in weights if not weight.isfinite().all()), None)
        problem = f"its weight {wrong!r} holds NaN or infinite values" if wrong else ""
    if problem:
        raise UserError(f"{problem}; give another model than {loaded.name!r}.")


def _load_weights(name: str, dtype: torch.dtype, quantization: Any, device: torch.device) -> Any:
    if is_adapter(name):
        require_package("peft", f"adapter {name!r}")
        model = _load_weights(base_model(name), dtype, quantization, device)
        load_adapter(model, name)
        return model
    settings: dict[str, Any] = {}
    if quantization is not None:
        # Quantised on the device where it computes: some kernels pack weights only on the GPU.
        settings = {"quantization_config": quantization, "device_map": device}
    try:
        loaded: Any = auto_class(load_model_config(name)).from_pretrained(
            located(name),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **settings,
        )
        model, info = loaded
        # transformers draws missing tensors at random and only warns.
        missing = sorted(info["missing_keys"])
        if not missing:
            return model
        failure = ValueError(f"it lacks {len(missing)} tensors, the first is {missing[0]!r}")
    except ImportError as error:
        raise missing_package(name, error) from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        failure = error
    raise unusable(
        f"no causal language model can be loaded from {name!r}",
        failure,
        "give a Hugging Face name, or a folder with config.json and model.safetensors",
    )


def missing_package(name: str, error: ImportError) -> UserError:
    """Return the error for a model whose config.json needs flash attention, bitsandbytes or the
    like."""
    return UserError(
        f"model {name!r} asks for a package that is not installed ({first_line(error)}); install "
        "it, or take attn_implementation or quantization_config out of its config.json."
    )


def save_model(language_model: LanguageModel, folder: Path) -> None:
    """Write weights, tokenizer and, for a vision model, its processor in transformers' format. For
    a LoRA student, write only the adapter, in PEFT's format.
    """
    if has_adapter(language_model.model):
        save_adapter(language_model.model, folder)
    else:
        language_model.model.save_pretrained(folder)
    vision = language_model.vision
    if vision is not None and vision.has_processor:
        vision.processor.save_pretrained(folder)
    try:
        language_model.tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # what the tokenizers package raises when the disk is full
            raise OSError(str(error)) from None
        raise


def remove_dropout(model: PreTrainedModel) -> None:
    """Disable dropout, since old, student and teacher log-probs must come from one function. Also
    disable the noise that some mixtures of experts add to their router in training mode.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
