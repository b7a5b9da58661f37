"""Student and teacher tokenizers and contexts: compared by token strings, not by size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlad.config.run import RolloutConfig
from rlad.findings import Finding
from rlad.teachers.compatibility import compare_contexts, compare_tokenizers
from tiny_runs import WORDS, write_model, write_tokenizer

Make = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Make:
    def make(
        words: tuple[str, ...] = WORDS, *, template: str | None = None, **settings: Any
    ) -> PreTrainedTokenizerBase:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_model(folder, seed=0)
        write_tokenizer(folder, words, **settings)
        made = AutoTokenizer.from_pretrained(folder)
        made.chat_template = template
        return made

    return make


def found(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> dict[str, Finding]:
    return {finding.subject: finding for finding in compare_tokenizers(student, teacher)}


def test_the_same_tokenizer(tokenizer):
    findings = found(tokenizer(), tokenizer())
    assert {finding.level for finding in findings.values()} == {"ok"}
    assert (
        findings["vocabulary"].message == "all 7 tokens of the student are the teacher's (it has 7)"
    )
    assert findings["end token"].message == "'<eos>' for both"
    assert findings["chat template"].message == "none for both"
    assert findings["thinking markers"].message == "none for both"


def test_a_teacher_with_more_tokens(tokenizer):
    assert found(tokenizer(), tokenizer((*WORDS, "3", "4")))["vocabulary"].level == "ok"


def test_another_tokenizer_of_the_same_size(tokenizer):
    finding = found(tokenizer(), tokenizer((*WORDS[:3], "2", "1", *WORDS[5:])))["vocabulary"]
    assert finding.level == "error"
    assert finding.message.startswith(
        "2 of 7 token ids differ, the first is id 3, '1' for the student and '2' for the teacher"
    )


def test_a_student_with_more_tokens(tokenizer):
    finding = found(tokenizer((*WORDS, "3")), tokenizer())["vocabulary"]
    assert (
        finding.level == "error"
        and "id 7, '3' for the student and not in the teacher's vocabulary" in finding.message
    )


def test_another_end_token(tokenizer):
    finding = found(tokenizer(), tokenizer(eos_token="="))["end token"]
    assert (
        finding.level == "warning"
        and "the student ends with '<eos>', the teacher with '='" in finding.message
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "level", "message"),
    [
        ("{{ a }}", "{{ a }}", "ok", "the same for both"),
        ("{{ a }}", "{{ b }}", "warning", "differ;"),
        ("{{ a }}", None, "warning", "only the student has one"),
        (None, "{{ b }}", "warning", "only the teacher has one"),
    ],
)
def test_chat_templates(tokenizer, ours, theirs, level, message):
    finding = found(tokenizer(template=ours), tokenizer(template=theirs))["chat template"]
    assert finding.level == level and message in finding.message


def test_thinking_markers_in_vocabulary_or_template(tokenizer):
    plain, trained = tokenizer(), tokenizer((*WORDS, "<think>", "</think>"))
    assert found(trained, trained)["thinking markers"].message == "</think>, <think> for both"
    finding = found(plain, trained)["thinking markers"]
    assert (
        finding.level == "warning"
        and "student none, teacher ['</think>', '<think>']" in finding.message
    )
    assert found(plain, tokenizer(template="x<think>"))["thinking markers"].level == "warning"


@pytest.mark.parametrize(
    ("prompt", "student", "teacher", "level"),
    [
        (None, 100, 100, "ok"),
        (None, 100, 200, "ok"),
        (None, 200, 100, "error"),
        (60, 200, 100, "ok"),
        (61, 200, 100, "error"),
        (None, 100, None, "ok"),
        (None, None, 100, "error"),
        (60, None, 100, "ok"),
    ],
)
def test_contexts(prompt, student, teacher, level):
    """40 tokens of completion; the longest sequence must fit into the teacher's context."""
    rollout = RolloutConfig(max_completion_tokens=40, max_prompt_tokens=prompt)
    finding = compare_contexts(rollout, student, teacher)
    assert finding.level == level
    assert level == "ok" or "set rollout.max_prompt_tokens to at most 60" in finding.message


@pytest.mark.parametrize(
    ("student", "teacher", "level"),
    [(100, 100, "ok"), (200, 100, "warning"), (None, 100, "warning"), (200, None, "ok")],
)
def test_an_episode_may_be_as_long_as_the_students_context(student, teacher, level):
    rollout = RolloutConfig(max_completion_tokens=40, max_prompt_tokens=60)
    finding = compare_contexts(rollout, student, teacher, has_turns=True)
    assert finding.level == level
    assert level == "ok" or "task.max_turns" in finding.message


def test_a_completion_that_is_longer_than_the_teachers_context():
    finding = compare_contexts(RolloutConfig(max_completion_tokens=100), 500, 100)
    assert finding.level == "error" and finding.message.endswith(
        "lower rollout.max_completion_tokens."
    )
