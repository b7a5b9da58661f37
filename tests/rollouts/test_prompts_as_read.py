"""What the student really reads and what verifiers are given: templates that drop, double or date a
prompt, and tags that are special tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlad.checks.prompts import check_first_prompt
from rlad.config.file import DEFAULT_RUN, load_config
from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.rollouts.prompts import chat_text, prompt_token_ids
from rlad.rollouts.texts import begun_completion, completion_texts, special_tags, written_thought
from rlad.rollouts.types import Completion
from rlad.tasks import Problem
from rlad.tasks.logic import logic_rl_reward
from rlad.tasks.verifiers import exact, number

HEADER = "<|im_start|>assistant\n"
ONE = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
EACH = f"{{% for m in messages %}}{ONE}{{% endfor %}}"
CHATML = f"{EACH}{{% if add_generation_prompt %}}{HEADER}{{% endif %}}"
HUMAN = CHATML.replace("in messages", "in messages if m['role'] == 'human'")
PARTS = CHATML.replace(
    "{{ m['content'] }}", "{% for c in m.content if c.type %}{{ c }}{% endfor %}"
)
QUESTION = "What is 2 + 3?"


def tokenizer(chat: str | None = CHATML, extra: tuple[str, ...] = ()) -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([QUESTION], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = chat
    return fast


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content']", "m['content'][:12]"),
        f"{{{{ messages[0]['content'] }}}}{HEADER}",
        HUMAN,
        PARTS,
    ],
)
def test_a_template_that_drops_the_question_is_refused(template):
    talk = (("user", "Hello."), ("assistant", "Hello."), ("user", QUESTION))
    with pytest.raises(UserError, match=r"omits or changes the user's message"):
        prompt_token_ids(tokenizer(template), talk, RolloutConfig())


def test_an_end_token_that_the_tokenizer_adds_is_no_end_of_a_prompt():
    one = tokenizer(None)
    one.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[("<|im_end|>", 2), ("<|endoftext|>", 0)],
    )
    shown = one.decode(prompt_token_ids(one, QUESTION, RolloutConfig()))
    assert shown == f"<|endoftext|>{QUESTION}"
    its_own = one.decode(prompt_token_ids(one, f"{QUESTION}<|im_end|>", RolloutConfig()))
    assert its_own == f"<|endoftext|>{QUESTION}<|im_end|>"


def findings(chat: str, question: str = QUESTION, **task: Any) -> list[str]:
    config = load_config(DEFAULT_RUN)
    config = config.model_copy(update={"task": config.task.model_copy(update=task)})
    source = SimpleNamespace(problem=lambda split, index, seed: Problem(question, "5", "key"))
    found = check_first_prompt(config, source, tokenizer(chat))  # type: ignore[arg-type]
    assert found[0].level == "ok" and "<|im_end|>" in found[0].message
    return [one.message for one in found[1:] if one.level == "warning"]


def test_the_first_prompt_is_shown_and_what_surprises_is_said():
    assert findings(CHATML) == []
    (doubled,) = findings(CHATML, f"<|im_start|>user\n{QUESTION}<|im_end|>\n{HEADER}")
    assert "a special token" in doubled and "prompt_format = 'plain'" in doubled
    (silent,) = findings(EACH)
    assert "add_generation_prompt" in silent
    assert findings(EACH + HEADER) == []
    (clock,) = findings("{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    assert "asks the clock, and is told 26 Jul 2024 on every day" in clock
    (made,) = findings("{% set form = '%d' %}{{ strftime_now(form) }}\n" + CHATML)
    assert "may have other prompts" in made
    unused = "{% if false %}{{ strftime_now('%d') }}{% endif %}" + CHATML
    assert findings(unused) == []
    thinking = CHATML.replace(HEADER, f"{HEADER}<think>\n")
    assert findings(thinking) == []
    (thought,) = findings(thinking, reward="logic_rl")
    assert "it ends with '<think>'" in thought


def test_a_template_that_asks_the_clock_has_one_date_on_every_day():
    chat = "{{ strftime_now('%d %b %Y, %H:%M') }} {{ strftime_now( \"%Y-%m-%d\" ) }}\n" + CHATML
    text = chat_text(tokenizer(chat), [{"role": "user", "content": QUESTION}], {})
    assert text.startswith("26 Jul 2024, 00:00 2024-07-26\n")


# --- tags -----------------------------------------------------------------------------------------

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def texts(one: Any, *said: str) -> list[str]:
    written = [Completion(tuple(one(text)["input_ids"]), (), False) for text in said]
    return completion_texts(one, written)


def test_tags_that_are_special_tokens_reach_the_verifier():
    one = tokenizer(extra=TAGS)
    assert list(special_tags(one).values()) == list(TAGS)
    said = "<think>7 or 9?</think><answer>4</answer>\nI hope that 12 people agree."
    (heard,) = texts(one, f"{said}<|im_end|>")
    assert heard == said
    assert [verifier(heard, "4").verdict for verifier in (exact, number)] == ["correct"] * 2
    (heard,) = texts(one, "<think> x </think><answer> Ada is a knight </answer><|im_end|>")
    assert logic_rl_reward(heard, {"ada": True}) == 3


def test_other_special_tokens_do_not():
    assert special_tags(tokenizer()) == {}
    assert texts(tokenizer(), "a<|im_start|>b<|im_end|>") == ["ab"]
    assert texts(tokenizer(extra=TAGS), "a<|im_start|><answer>b<|im_end|>") == ["a<answer>b"]


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        (f"{HEADER}<think>\n", "<think>\n"),
        (f"{HEADER}<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        (f"between <think> and </think>.\n{HEADER}", ""),
        ("<think>a</think>", ""),
    ],
)
def test_what_the_prompt_has_written_of_the_completion(prompt, begun):
    assert written_thought(prompt) == begun
    one = tokenizer()
    assert begun_completion(one, one(prompt)["input_ids"]) == begun


def test_a_thought_that_the_prompt_begins_is_a_thought():
    said = "it is 4"
    assert number(said, "4").verdict == "correct"
    assert number(f"<think>\n{said}", "4").verdict == "wrong"
    assert number(f"<think>\n7?</think>{said}", "4").verdict == "correct"
    tail = "Ada must be one.\n</think><answer> Ada is a knight </answer>"
    for begun in ("", "<think>\n"):
        assert logic_rl_reward(begun + tail, {"ada": True}) == 3
    assert logic_rl_reward("<answer> Ada is a knight </answer>", {"ada": True}) == -3
