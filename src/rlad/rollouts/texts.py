"""The text of a completion's tokens, as verifiers read it."""

import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rlad.rollouts.types import Completion, Rollout, Turn
from rlad.tasks.answers import outside_thoughts

_TAG = re.compile(r"</?[A-Za-z][\w-]*>")
_WRITTEN_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?$")


def special_tags(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """List the special tokens that are tags in a text, such as `<think>` and `</answer>`."""
    roles = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    own = {getattr(tokenizer, f"{role}_token", None) for role in roles}
    special = {
        token_id: str(token)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    return {i: text for i, text in special.items() if _TAG.fullmatch(text) and text not in own}


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion]
) -> list[str]:
    """Decode completions without special tokens, except for those that are tags."""
    tokens = [list(completion.token_ids) for completion in completions]
    # Verifiers read <answer>, and a format reward checks <think>, which are special tokens of some
    # tokenizers.
    if not special_tags(tokenizer):
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)
    silent = silent_tokens(tokenizer)
    kept = [[token for token in ids if token not in silent] for ids in tokens]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


def silent_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special tokens that are left out of a text: all except tags."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (special | set(tokenizer.all_special_ids)) - special_tags(tokenizer).keys()


def written_thought(prompt: str) -> str:
    """Find the `<think>`, or the empty thought, that a chat template has written at the end of a
    prompt. It is the beginning of the student's text."""
    found = _WRITTEN_THOUGHT.search(prompt[-100:])
    return found[0] if found else ""


def begun_completion(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str:
    """Return the part of the completion that the end of its prompt already contains."""
    return written_thought(str(tokenizer.decode(list(prompt[-64:]), skip_special_tokens=False)))


def conversation_text(turns: Sequence[Turn]) -> str:
    """Join the turns of an episode with the replies that the model has read."""
    parts = [part for turn in turns for part in (turn.text, turn.reply)][: 2 * len(turns) - 1]
    return "\n\n".join(parts)


def text_without_thoughts(rollout: Rollout) -> str:
    """Return a rollout's text without its thoughts. Thoughts of an episode are removed turn by
    turn, since a chat template may have begun the thought of each."""
    turns = [replace(turn, text=outside_thoughts(turn.text)) for turn in rollout.turns]
    return conversation_text(turns) if turns else outside_thoughts(rollout.text)
