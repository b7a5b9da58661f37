"""From a problem's prompt to the token ids that the model is given."""

from transformers import PreTrainedTokenizerBase


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_format: str) -> list[int]:
    """Token ids of a prompt: through the chat template as a user message (`chat`), as it is (`plain`), or as the tokenizer has one
    or not (`auto`). Raises `ValueError` for `chat` without a template.
    """
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "rollout.prompt_format is 'chat' but the student's tokenizer has no chat template; use 'plain' or 'auto'."
        )
    if prompt_format == "plain" or not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
