"""Between two turns: what a chat template writes, token for token, and templates that rewrite what
was said before."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.turns import TurnTemplate
from tiny_runs import WORDS, write_tokenizer

CHAT_WORDS = (*WORDS, "<|im_start|>", "<|im_end|>", "<think>", "</think>", "user", "assistant")
BEGIN = "{% for message in messages %}<|im_start|> {{ message.role }}\n"
END = " <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
KEEPS = BEGIN + "{{ message.content }}" + END
DROPS = BEGIN + "{{ message.content.split('</think>')[-1].strip() }}" + END
BEGINS = KEEPS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
EMPTY = KEEPS.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
LIKE_QWEN3 = DROPS.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")


def template(folder: Path, text: str | None, **rollout: Any) -> tuple[TurnTemplate, RolloutConfig]:
    settings = {} if text is None else {"chat_template": text, "eos_token": "<|im_end|>"}
    write_tokenizer(folder, CHAT_WORDS, **settings)
    config = RolloutConfig(**rollout)
    return TurnTemplate(AutoTokenizer.from_pretrained(folder), config), config


def test_turn_by_turn_it_is_the_conversation_as_a_whole(tmp_path):
    turns, config = template(tmp_path, KEEPS)
    turns.require_prefix("1 + 1 =")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.eos_token_id
    ids = prompt_token_ids(tokenizer, "1 + 1 =", config)
    messages = [("user", "1 + 1 =")]
    for said, reply in (("2", "1 + 0 ="), ("0 1", "2 + 2 =")):
        ids += [*tokenizer(said, add_special_tokens=False)["input_ids"], end]
        ids += turns.reply_ids("1 + 1 =", reply, end, has_ended=True)
        messages += [("assistant", said), ("user", reply)]
    assert ids == prompt_token_ids(tokenizer, tuple(messages), config)


def test_a_turn_that_was_cut_off_is_ended_by_the_template(tmp_path):
    turns, _ = template(tmp_path, KEEPS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    cut = turns.reply_ids("1 + 1 =", "0", 2, has_ended=False)
    ended = turns.reply_ids("1 + 1 =", "0", tokenizer.eos_token_id, has_ended=True)
    assert cut == [tokenizer.eos_token_id, *ended]
    # An end token that is not the template's stays, and the template's follows.
    other = tokenizer.convert_tokens_to_ids("<eos>")
    assert turns.reply_ids("1 + 1 =", "0", other, has_ended=True) == cut


def test_without_a_template_the_reply_follows(tmp_path):
    turns, _ = template(tmp_path, None)
    turns.require_prefix("1 + 1 =")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = turns.reply_ids("1 + 1 =", "2 + 1 =", tokenizer.eos_token_id, has_ended=True)
    assert tokenizer.decode(ids) == "2 + 1 ="


@pytest.mark.parametrize("text", [DROPS, LIKE_QWEN3])
def test_a_template_that_rewrites_earlier_turns_is_refused_or_kept_out(tmp_path, text):
    turns, _ = template(tmp_path, text)
    with pytest.raises(UserError, match="rewritten_turns = 'keep'"):
        turns.require_prefix("1 + 1 =")
    kept, _ = template(tmp_path, text, rewritten_turns="keep")
    kept.require_prefix("1 + 1 =")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = kept.reply_ids("1 + 1 =", "0", tokenizer.eos_token_id, has_ended=True)
    wanted = "<|im_start|> user 0 <|im_end|> <|im_start|> assistant"
    assert tokenizer.decode(ids).removesuffix(" <think> </think>") == wanted


@pytest.mark.parametrize("text", [BEGINS, EMPTY])
def test_a_thought_that_the_template_begins_is_part_of_the_turn(tmp_path, text):
    turns, _ = template(tmp_path, text)
    turns.require_prefix("1 + 1 =")
