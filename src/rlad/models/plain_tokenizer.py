"""A folder's tokenizer by its tokenizer.json alone, where transformers would take that as it is.
Imports no transformers."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenizers import AddedToken, Tokenizer

from rlad.models.files import EMBEDDED, files_of, plain_config, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AS_IT_IS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""tokenizer classes whose tokenizer.json says everything; of all others transformers makes
something of its own"""
_FAMILIES = ("llama", "qwen3")
"""in which transformers believes a model that names such a class; elsewhere (Qwen2) it may take
another"""
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CHANGE_TEXT_OR_TOKENS = (
    *("auto_map", "chat_template", "split_special_tokens"),
    *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
)
_OTHER_FILES = (
    "chat_template.jinja",
    "added_tokens.json",
    "special_tokens_map.json",
    "additional_chat_templates",
)


class PlainTokenizer:
    """What a check asks of a tokenizer: ids of a text, names of ids, special tokens. It has no chat
    template."""

    chat_template: str | None = None

    def __init__(self, tokenizer: Tokenizer, special_tokens: dict[str, str], name_or_path: str):
        self._tokenizer, self.name_or_path = tokenizer, name_or_path
        self.bos_token, self.eos_token, self.pad_token = (
            special_tokens.get(f"{kind}_token") for kind in ("bos", "eos", "pad")
        )
        self.eos_token_id = (
            None if self.eos_token is None else tokenizer.token_to_id(self.eos_token)
        )

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {
            "input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        }

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        return [self._tokenizer.id_to_token(i) for i in ids]


AnyTokenizer: TypeAlias = "PreTrainedTokenizerBase | PlainTokenizer"


def plain_tokenizer(name: str) -> PlainTokenizer | None:
    """The tokenizer of a folder; None where tokenizer.json is missing or not all that transformers
    would go by."""
    config, folder = plain_config(name), Path(files_of(name))
    if config is None or not (name in EMBEDDED or config.model_type in _FAMILIES):
        return None
    settings = read_json(folder / "tokenizer_config.json")
    is_plain = (
        settings.get("tokenizer_class") in _AS_IT_IS
        and not any(settings.get(key) for key in _CHANGE_TEXT_OR_TOKENS)
        and not any(
            settings[key] for key in settings if key.endswith("_token") and key not in _SPECIAL
        )
        and not any((folder / file).exists() for file in _OTHER_FILES)
    )
    if not is_plain or not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises nothing narrower; transformers names what is wrong
        return None
    special = {key: _content(settings[key]) for key in _SPECIAL if settings.get(key)}
    added = settings.get("added_tokens_decoder") or {}
    if (
        not _are_known(tokenizer, special.values(), added)
        or tokenizer.truncation
        or tokenizer.padding
    ):
        return None
    return PlainTokenizer(tokenizer, special, str(name)) if tokenizer.get_vocab_size() else None


def _content(token: Any) -> str:
    """A special token is a string or a table with its string."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _are_known(tokenizer: Tokenizer, special: Iterable[str], added: dict[str, Any]) -> bool:
    """Whether transformers would add or change none of them: they stand there as added ones, with
    the same flags."""
    known = tokenizer.get_added_tokens_decoder()
    return set(special) <= {token.content for token in known.values()} and all(
        number.isdecimal()
        and int(number) in known
        and isinstance(said, dict)
        and _is_as_said(known[int(number)], said)
        for number, said in added.items()
    )


def _is_as_said(token: AddedToken, said: dict[str, Any]) -> bool:
    flags = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
    return all(said[flag] == getattr(token, flag) for flag in flags if flag in said)
