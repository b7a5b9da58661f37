"""Compare the strings of tokens on a server with those of the student's tokenizer."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

PROBE = (
    "Question: A train leaves at 9:45 and arrives at 12:07. How long does it take? Let's think "
    "step by step.\n"
    "From 9:45 to 12:00 it is 2 hours and 15 minutes; 7 more make 2 h 22 min. So the answer is 142 "
    "minutes.\n"
    "\tÜber naïve façades: 你好, Привет! if x_1 != 3.14: return [f(x) for x in y]"
)
MIN_PROBE_TOKENS = 12
MAX_PROBE_TOKENS = 128
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise the probe text with the student's tokenizer. For a vocabulary of few words, take
    tokens spread over it instead."""
    ids = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])[:MAX_PROBE_TOKENS]
    if len(set(ids)) >= MIN_PROBE_TOKENS:
        return ids
    spread = spread_ids(tokenizer, MIN_PROBE_TOKENS)
    return [spread[11 * i % len(spread)] for i in range(MIN_PROBE_TOKENS)]


def spread_ids(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[int]:
    """Pick at most `num_tokens` ids, evenly spread over the vocabulary, including the last one."""
    ids = sorted(tokenizer.get_vocab().values())
    num_tokens = min(num_tokens, len(ids))
    return [ids[(i + 1) * len(ids) // num_tokens - 1] for i in range(num_tokens)]


def differing_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], strings: Sequence[str]
) -> tuple[int, list[tuple[int, str, str]]]:
    """Count the tokens that can be compared, and list those with another string on the server: id,
    ours, theirs.

    Spaces at the ends are ignored, since decoders differ in them. Parts of characters and missing
    strings ("") are not compared.
    """
    differing: list[tuple[int, str, str]] = []
    num_compared = 0
    for token, theirs in zip(tokens, strings, strict=True):
        ours = _text(tokenizer, token)
        if not theirs.strip() or _REPLACEMENT in ours or _REPLACEMENT in theirs:
            continue
        num_compared += 1
        piece = str(tokenizer.convert_ids_to_tokens(token))
        if _plain(theirs) not in (_plain(ours), _plain(piece)):
            differing.append((token, ours, theirs))
    return num_compared, differing


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(
        tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _plain(string: str) -> str:
    """Remove the space markers of byte-level and sentencepiece vocabularies."""
    return string.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").strip()
