"""From a problem's prompt to the token ids that the model is given."""

from transformers import PreTrainedTokenizerBase

from rlad.config import RolloutConfig


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_format: str) -> list[int]:
    """Token ids of a prompt: through the chat template as a user message (`chat`), as it is (`plain`), or as the tokenizer
    has one or not (`auto`). Raises `ValueError` for `chat` without a template.
    """
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "rollout.prompt_format is 'chat' but the student's tokenizer has no chat template; use 'plain' or 'auto'."
        )
    if prompt_format == "plain" or not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return tokenizer(str(text), add_special_tokens=False)["input_ids"]


def check_prompt_length(num_tokens: int, what: str, rollout: RolloutConfig, context_tokens: int | None) -> None:
    """`ValueError` when a prompt leaves no room for its completion, or is longer than the config allows."""
    longest, why = rollout.max_prompt_tokens, "rollout.max_prompt_tokens"
    if context_tokens is not None:
        room = context_tokens - rollout.max_completion_tokens
        if longest is None or room < longest:
            longest = room
            why = f"context of {context_tokens} minus rollout.max_completion_tokens = {rollout.max_completion_tokens}"
    if longest is not None and num_tokens > longest:
        raise ValueError(
            f"the prompt of {what} has {num_tokens} tokens, but at most {max(longest, 0)} are allowed ({why}); "
            "shorten the prompts or change that setting."
        )
