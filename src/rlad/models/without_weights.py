"""Read what is known of a model without its weights: config, tokenizer, end tokens, context."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file

from rlad.errors import UserError
from rlad.models.files import (
    EMBEDDED,
    base_model,
    files_of,
    has_tokenizer,
    located,
    require_model_folder,
)
from rlad.models.rope import longest_with_one_rope
from rlad.models.vision import Vision, sees
from rlad.text import first_line

_IF_THERE: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}
TOKENS_OF_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
# The errors that transformers raises for wrong files.
_UNUSABLE_FILES = (OSError, ValueError, TypeError, KeyError, AttributeError)


def load_model_config(name: str) -> PretrainedConfig:
    """Load a model's config; for an adapter, that of its base model.

    Raises `UserError` if `name` is not a model.
    """
    base = base_model(name)
    what = f"model {base!r}" if base == name else f"model {base!r}, of adapter {name!r},"
    require_model_folder(base, what)
    try:
        return AutoConfig.from_pretrained(located(base), trust_remote_code=False)
    except _UNUSABLE_FILES as error:
        raise unusable(
            f"{what} cannot be found or read",
            error,
            "give a folder that `save_pretrained` wrote, or a Hugging Face name that is in the "
            f"cache or can be downloaded; the embedded models are {', '.join(EMBEDDED)}",
        ) from None


def load_generation_config(name: str) -> GenerationConfig | None:
    """Load a model's `generation_config.json`, which may name end tokens; None without one.

    Raises `UserError` if it is damaged, since its end tokens would be lost silently.
    """
    where = str(files_of(name))
    try:
        return GenerationConfig.from_pretrained(where)
    except _UNUSABLE_FILES as error:
        if cached_file(where, GENERATION_CONFIG_NAME, **_IF_THERE) is None:
            return None
        raise unusable(
            f"{GENERATION_CONFIG_NAME} of {name!r} cannot be read",
            error,
            "put a whole one there, or delete it where config.json names all end tokens",
        ) from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; for an adapter, its own if it has one.

    Raises `UserError` if there is none or it cannot be loaded.
    """
    config = load_model_config(name)
    where = name if has_tokenizer(name) else files_of(name)
    failure: Exception = ValueError("it is empty")
    try:
        if tokenizer := AutoTokenizer.from_pretrained(where, trust_remote_code=False):
            if sees(config) and not tokenizer.chat_template:
                tokenizer.chat_template = _template_of_processor(where)
            return tokenizer
    except _UNUSABLE_FILES as error:
        failure = error
    raise unusable(
        f"no tokenizer can be loaded from {name!r}",
        failure,
        "save the tokenizer beside the model with `tokenizer.save_pretrained(folder)`",
    )


def _template_of_processor(where: Path | str) -> str | None:
    """Read the chat template from the separate file of older vision models, which transformers
    reads only with a processor."""
    found = cached_file(where, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, **_IF_THERE)
    return None if found is None else json.loads(Path(found).read_text("utf-8"))["chat_template"]


def context_tokens(config: Any) -> int | None:
    """Return the longest sequence that a model supports; None if its config does not state it."""
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (stated, longest_with_one_rope(config)) if limit is not None]
    return min(limits, default=None)


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
    vocabulary = max(config.get_text_config().vocab_size, len(tokenizer))
    unknown = [one for one in ids if not 0 <= one < vocabulary]
    if unknown or not ids:
        problem = f"end token {unknown[0]}, above its {vocabulary}" if unknown else "no end token"
        raise UserError(
            f"model {tokenizer.name_or_path!r} declares {problem}; correct eos_token_id in its "
            "generation_config.json or config.json, or eos_token of its tokenizer."
        )
    return tuple(dict.fromkeys(ids))


def token_id(tokenizer: Any, token: str, setting: str) -> int:
    """Return the id of one token by its string. Raises `UserError` if there is no such token."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise UserError(
            f"{setting} names {token!r}, which is not a single token of "
            f"{tokenizer.name_or_path!r}; correct it."
        )
    return found


def load_vision(name: str, tokenizer: Any) -> Vision | None:
    """Return the picture processor of a model whose weights are not loaded; None if it reads only
    text."""
    config = load_model_config(name)
    return Vision(name, files_of(name), tokenizer, config) if sees(config) else None


def unused_generation_settings(name: str) -> list[str]:
    """List the settings besides tokens in a model's `generation_config.json`, which rlad does not
    use."""
    generation = load_generation_config(name)
    table = generation.to_diff_dict() if generation is not None else {}
    known = (*TOKENS_OF_GENERATION, "transformers_version", "_from_model_config", "use_cache")
    return sorted(
        f"{key} = {value!r}" for key, value in table.items() if value and key not in known
    )


def unusable(problem: str, error: Exception, advice: str) -> UserError:
    """Return the error for files that transformers does not accept; code in them is not run."""
    if "trust_remote_code" in str(error):
        reason = "it comes with Python code of its own, which rlad does not run"
        advice = "use a model whose architecture and tokenizer are part of transformers"
    else:
        reason = first_line(error)
    return UserError(f"{problem} ({reason}); {advice}.")
