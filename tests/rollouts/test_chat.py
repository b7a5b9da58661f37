"""Conversations, chat templates, thinking and end tokens: student and teacher, with tiny models and
a template like Qwen3's.

The last section takes the tokenizer of SmolLM2-135M-Instruct, where `rlad models prepare
smollm2-135m` has put it.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad
from rlad.checks.check import check_run
from rlad.config.file import parse_config
from rlad.config.run import RolloutConfig
from rlad.models.loading import LanguageModel, load_language_model
from rlad.models.packaged import PACKAGED
from rlad.models.student import load_student
from rlad.models.without_weights import load_tokenizer
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.sampling import sample
from rlad.runs.directory import METRICS, RunDirectory
from rlad.tasks import Problem, make_task
from rlad.teachers import check_teacher, prepare_teacher, setting_of
from rlad.teachers.base import TeacherRequest
from tiny_runs import WORDS, run_config, write_model, write_tokenizer, write_world

CHAT_WORDS = (
    *WORDS,
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "system",
    "user",
    "assistant",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant"
    "{% if enable_thinking is defined and enable_thinking is false %} <think> </think>{% endif "
    "%}{% endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model as student and teacher, and `base`: the student's weights without a template."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    for name, seed in (("student", 1), ("teacher", 2), ("base", 1)):
        write_model(folder / name, seed=seed, words=CHAT_WORDS)
        chat = {} if name == "base" else {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
        write_tokenizer(folder / name, CHAT_WORDS, **chat)
    return folder


def given(folder: Path | str, prompt: Any, **settings: Any) -> str:
    tokenizer = load_tokenizer(str(folder))
    return tokenizer.decode(prompt_token_ids(tokenizer, prompt, RolloutConfig(**settings)))


# --- the student's prompt -------------------------------------------------------------------------

CONVERSATION = (("system", "0"), ("user", "1 + 1 ="), ("assistant", "2"), ("user", "2 + 1 ="))


def test_a_conversation_becomes_the_templates_text(world):
    one = "<|im_start|> user 1 + 1 = <|im_end|> <|im_start|> assistant"
    assert (
        given(world / "student", "1 + 1 =")
        == one
        == given(world / "student", (("user", "1 + 1 ="),))
    )
    assert given(world / "student", CONVERSATION) == (
        "<|im_start|> system 0 <|im_end|> <|im_start|> user 1 + 1 = <|im_end|> <|im_start|> "
        "assistant 2 <|im_end|> "
        "<|im_start|> user 2 + 1 = <|im_end|> <|im_start|> assistant"
    )


def test_thinking_is_the_templates_variable(world):
    ends = {
        value: given(
            world / "student", "1", chat_template_kwargs={"enable_thinking": value}
        ).partition("assistant ")[2]
        for value in (True, False)
    }
    assert ends == {True: "", False: "<think> </think>"}


def test_the_system_prompt_comes_first_and_a_conversations_own_wins(world):
    told = given(world / "student", "1", system_prompt="2 2")
    assert told.startswith("<|im_start|> system 2 2 <|im_end|> <|im_start|> user 1")
    assert given(world / "student", CONVERSATION, system_prompt="2 2") == given(
        world / "student", CONVERSATION
    )


def test_what_a_template_would_swallow_is_refused(world, tmp_path):
    with pytest.raises(
        ValueError, match=r"of the student's tokenizer does not know 'enable_thinkin'; leave it out"
    ):
        given(world / "student", "1", chat_template_kwargs={"enable_thinkin": False})
    write_tokenizer(tmp_path, CHAT_WORDS, chat_template="{{ messages[-1].content }} =")
    write_model(tmp_path, seed=0, words=CHAT_WORDS)
    write_tokenizer(tmp_path, CHAT_WORDS, chat_template="{{ messages[-1].content }} =")
    assert given(tmp_path, "1") == "1 ="
    with pytest.raises(ValueError, match="omits the system message; put its text into the prompts"):
        given(tmp_path, "1", system_prompt="2 2")


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("1", {"system_prompt": "2"}, r"rollout.system_prompt does not work with plain prompts"),
        (
            "1",
            {"chat_template_kwargs": {"enable_thinking": True}},
            "rollout.chat_template_kwargs does not work with plain",
        ),
        (
            CONVERSATION,
            {},
            r"a prompt is a conversation \(system, user, assistant, user\), which plain prompts",
        ),
    ],
)
def test_plain_prompts_are_one_text(world, prompt, settings, message):
    assert given(world / "base", (("user", "1 + 1 ="),)) == "1 + 1 ="
    for folder, more in (("base", {}), ("student", {"prompt_format": "plain"})):
        with pytest.raises(ValueError, match=message):
            given(world / folder, prompt, **settings, **more)


# --- end tokens -----------------------------------------------------------------------------------


def favour(model: LanguageModel, token: int) -> LanguageModel:
    """The token is the most likely one everywhere."""
    with torch.no_grad():
        model.model.get_output_embeddings().weight.zero_()
        hidden = model.model.get_submodule("model.norm").weight
        hidden.fill_(1.0)
        model.model.get_output_embeddings().register_forward_hook(
            lambda _m, _i, logits: logits + one_hot(logits, token)
        )
    return model


def one_hot(logits: Tensor, token: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), logits.shape[-1]) * 100.0


def num_sampled(model: LanguageModel) -> int:
    (group,) = sample(
        model, [[2, 3]], group_size=1, max_completion_tokens=5, temperature=1.0, seed=0
    )
    return len(group[0].token_ids)


def test_a_completion_ends_with_every_token_that_the_model_declares(world, tmp_path):
    """`<eos>` by generation_config.json, `<|im_end|>` by the tokenizer; `=` ends where
    student.end_tokens says so."""
    ids = {word: CHAT_WORDS.index(word) for word in ("<eos>", "<|im_end|>", "=", "1")}
    assert load_language_model(str(world / "student")).eos_token_ids == (
        ids["<eos>"],
        ids["<|im_end|>"],
    )
    for word, length in (("<eos>", 1), ("<|im_end|>", 1), ("=", 5), ("1", 5)):
        assert (
            num_sampled(favour(load_language_model(str(world / "student")), ids[word])) == length
        ), word
    more = load_language_model(str(world / "student"), end_tokens=["="])
    assert more.eos_token_ids == (*(ids[word] for word in ("<eos>", "<|im_end|>", "=")),)
    more.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == list(
        more.eos_token_ids
    )
    assert num_sampled(favour(more, ids["="])) == 1
    with pytest.raises(
        ValueError, match=r"student.end_tokens names 'stop', which is not a single token of"
    ):
        load_language_model(str(world / "student"), end_tokens=["stop"])


def special_tokens(config: dict[str, Any]) -> str:
    findings = check_run(parse_config(config), with_models=False).findings
    return next(finding.message for finding in findings if finding.subject == "special tokens")


def test_check_names_them_all(world, tmp_path):
    model = write_model(tmp_path / "several", seed=1, words=CHAT_WORDS)
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, CHAT_WORDS.index("<|im_end|>")]})
    )
    config = run_config(world, tmp_path / "run", student={"model": str(model), "end_tokens": ["="]})
    assert special_tokens(config).startswith("a completion ends with '<eos>', '<|im_end|>', '='; ")


def levels(config: dict[str, Any]) -> dict[str, str]:
    parsed = parse_config(config)
    setting = setting_of(parsed, load_student(parsed))
    return {finding.subject: finding.level for finding in check_teacher(parsed.teacher, setting)}


def test_a_base_student_of_a_chat_teacher(world, tmp_path):
    """What differs is a warning until one of the two remedies is taken."""
    base = str(world / "base")
    form = {"chat_template": "teacher", "end_token": "<|im_end|>", "template": "{prompt}"}
    config = run_config(world, tmp_path, student={"model": base})
    differs = {subject for subject, level in levels(config).items() if level == "warning"}
    assert differs == {"end token", "chat template"}
    ended = run_config(world, tmp_path, student={"model": base, "end_tokens": ["<|im_end|>"]})
    assert (levels(ended)["end token"], levels(ended)["chat template"]) == ("ok", "warning")
    inner = {"model": str(world / "teacher")}
    told = run_config(world, tmp_path, student={"model": base}) | {
        "teacher": {"type": "privileged", "teacher": inner} | form
    }
    assert (
        levels(told)["end token"],
        levels(told).get("chat template"),
        levels(told)["template"],
    ) == ("ok", None, "ok")


# --- the teacher's prompt -------------------------------------------------------------------------


def by_hand(model: LanguageModel, prompt: str, completion: Sequence[int]) -> Tensor:
    """Log-probs of the completion behind a text, by one forward pass."""
    ids = [*model.tokenizer(prompt, add_special_tokens=False)["input_ids"], *completion]
    with torch.no_grad():
        logprobs = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack(
        [
            logprobs[position - 1, ids[position]]
            for position in range(len(ids) - len(completion), len(ids))
        ]
    )


def asked_of_teacher(
    world: Path, tmp_path: Path, student: str, problem: Problem, ids: list[int], **form: Any
) -> Tensor:
    """What the teacher of a run says of one completion, in a form of its own."""
    teacher = {
        "type": "privileged",
        "template": "{prompt}",
        "teacher": {"model": str(world / "teacher")},
        **form,
    }
    config = parse_config(
        run_config(world, tmp_path)
        | {"student": {"model": str(world / student)}, "teacher": teacher}
    )
    loaded = load_student(config)
    made = prepare_teacher(config, loaded)
    assert made is not None
    prompt = prompt_token_ids(loaded.tokenizer, problem.asked, config.rollout)
    (values,) = made.logprobs([TeacherRequest(prompt, ids, problem)])
    return values


HEAD = "<|im_start|> user 1 + 1 = <|im_end|>"
TAIL = "<|im_start|> assistant"


@pytest.mark.parametrize(
    ("student", "form", "prompt"),
    [
        (
            "student",
            {"chat_template_kwargs": {"enable_thinking": False}},
            f"{HEAD} {TAIL} <think> </think>",
        ),
        ("student", {"system_prompt": "2 2"}, f"<|im_start|> system 2 2 <|im_end|> {HEAD} {TAIL}"),
        (
            "student",
            {"template": "{answer} {prompt}"},
            f"<|im_start|> user 2 1 + 1 = <|im_end|> {TAIL}",
        ),
        ("base", {"chat_template": "teacher"}, f"{HEAD} {TAIL}"),
        (
            "base",
            {
                "chat_template": "teacher",
                "system_prompt": "0",
                "chat_template_kwargs": {"enable_thinking": False},
            },
            f"<|im_start|> system 0 <|im_end|> {HEAD} {TAIL} <think> </think>",
        ),
        ("base", {}, "1 + 1 ="),
    ],
)
def test_the_teacher_scores_the_same_tokens_behind_its_own_prompt(
    world, tmp_path, student, form, prompt
):
    completion = [3, 5, 4, 1]
    found = asked_of_teacher(
        world, tmp_path, student, Problem("1 + 1 =", "2", "k"), completion, **form
    )
    teacher = load_language_model(str(world / "teacher"))
    torch.testing.assert_close(found, by_hand(teacher, prompt, completion), rtol=0, atol=2e-5)
    # The other prompts give other values: the test can tell them apart.
    assert (by_hand(teacher, f"{prompt} 0", completion) - found).abs().max() > 1e-2


def test_in_a_conversation_the_template_is_the_last_message(world, tmp_path):
    problem = Problem("shown", "0", "k", messages=CONVERSATION)
    completion = [4, 3]
    found = asked_of_teacher(
        world, tmp_path, "student", problem, completion, template="{answer} {prompt}"
    )
    turns = (
        "<|im_start|> system 0 <|im_end|> <|im_start|> user 1 + 1 = <|im_end|> "
        "<|im_start|> assistant 2 <|im_end|>"
    )
    prompt = f"{turns} <|im_start|> user 0 2 + 1 = <|im_end|> {TAIL}"
    torch.testing.assert_close(
        found,
        by_hand(load_language_model(str(world / "teacher")), prompt, completion),
        rtol=0,
        atol=2e-5,
    )


def test_the_teachers_own_end_is_scored_in_the_place_of_the_students(world, tmp_path):
    """`<eos>` (1) of the student is `<|im_end|>` of the teacher, at the end alone; a completion
    that was cut off has none."""
    end = CHAT_WORDS.index("<|im_end|>")
    teacher = load_language_model(str(world / "teacher"))
    for completion, scored in (
        ([3, 1, 4, 1], [3, 1, 4, end]),
        ([3, 4], [3, 4]),
        ([1], [end]),
        ([end], [end]),
    ):
        found = asked_of_teacher(
            world,
            tmp_path,
            "base",
            Problem("1 + 1 =", "2", "k"),
            completion,
            end_token="<|im_end|>",
        )
        torch.testing.assert_close(found, by_hand(teacher, "1 + 1 =", scored), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            {"chat_template_kwargs": {"thinking": True}},
            "of the student's tokenizer does not know 'thinking'",
        ),
        ({"end_token": "stop"}, "teacher.end_token names 'stop', which is not a single token of"),
        (
            {"chat_template": "teacher", "teacher": {"model": "BASE"}},
            "base' has no tokenizer with a chat template",
        ),
        (
            {"chat_template": "teacher", "teacher": {"type": "ema"}},
            'average" has no tokenizer with a chat template',
        ),
    ],
)
def test_forms_that_cannot_be_are_refused_before_training(world, tmp_path, form, message):
    form = json.loads(json.dumps(form).replace("BASE", str(world / "base")))
    teacher = {
        "type": "privileged",
        "teacher": {"model": str(world / "teacher")},
        "template": "{prompt}",
        **form,
    }
    config = run_config(world, tmp_path / "run") | {"teacher": teacher}
    with pytest.raises(ValueError, match=message):
        rlad.train(config)
    assert not (tmp_path / "run").exists()


def test_a_base_student_learns_from_a_thinking_chat_teacher(world, tmp_path):
    rows = [
        json.dumps({"prompt": [{"role": "user", "content": f"{a} + {b} ="}], "answer": (a + b) % 3})
        for a in range(3)
        for b in range(3)
    ]
    for name, part in (("path", rows[:5]), ("validation_path", rows[5:7]), ("test_path", rows[7:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    task = {
        name: str(tmp_path / f"{name}.jsonl") for name in ("path", "validation_path", "test_path")
    }
    teacher = {
        "type": "privileged",
        "template": "{prompt}",
        "chat_template": "teacher",
        "end_token": "<|im_end|>",
    }
    teacher |= {
        "chat_template_kwargs": {"enable_thinking": True},
        "teacher": {"model": str(world / "teacher")},
    }
    config = run_config(
        world, tmp_path / "run", student={"model": str(world / "base")}, task=task
    ) | {"teacher": teacher}
    rlad.train(config | {"optimization": {"num_steps": 2}, "objective": {"type": "opd"}})
    steps = list(RunDirectory(tmp_path / "run").read(METRICS))
    assert [row["teacher/privileged/frac"] for row in steps] == [1, 1]
    assert all(row["teacher/log_ratio/mean"] != 0 for row in steps)


# --- SmolLM2 --------------------------------------------------------------------------------------

SMOLLM2 = "smollm2-135m"
smollm2 = pytest.mark.skipif(
    not PACKAGED[SMOLLM2].is_ready, reason="run `rlad models prepare smollm2-135m` once"
)
TURN = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.smollm2
@smollm2
def test_smollm2_is_given_its_own_chat_format():
    """Written by hand; the template adds its own system message where there is none."""
    default = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n"
    )
    assert given(SMOLLM2, "What is 2 + 3?") == default + TURN
    system = given(SMOLLM2, "What is 2 + 3?", system_prompt="Answer in one word.")
    assert system == "<|im_start|>system\nAnswer in one word.<|im_end|>\n" + TURN
    turns = (("user", "Hi"), ("assistant", "Hello!"), ("user", "What is 2 + 3?"))
    told = (
        default + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n" + TURN
    )
    assert given(SMOLLM2, turns) == told
    ids = prompt_token_ids(load_tokenizer(SMOLLM2), "What is 2 + 3?", RolloutConfig())
    assert (
        ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2
    )  # <|im_start|> and <|im_end|>, each one token
    with pytest.raises(ValueError, match="does not know 'enable_thinking'"):
        given(SMOLLM2, "1", chat_template_kwargs={"enable_thinking": False})


@pytest.mark.smollm2
@smollm2
def test_smollm2_as_a_base_student_ends_with_two_tokens(tmp_path):
    """A tiny model with SmolLM2's tokenizer whose end token is the base model's `<|endoftext|>`."""
    tokenizer = load_tokenizer(SMOLLM2)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(
        write_model(tmp_path / "base", seed=0, vocab_size=len(tokenizer), eos_token_id=0)
    )
    base = load_language_model(str(tmp_path / "base"), end_tokens=["<|im_end|>"])
    assert base.tokenizer.convert_ids_to_tokens(list(base.eos_token_ids)) == [
        "<|endoftext|>",
        "<|im_end|>",
    ]
    assert num_sampled(favour(base, 2)) == 1


def test_conversations_of_a_file_reach_the_model(world, tmp_path):
    """From the file to the ids of a problem."""
    messages = [{"role": role, "content": content} for role, content in CONVERSATION]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{i} ="}], "answer": i}) + "\n"
            for i in range(60)
        )
    )
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"messages": messages, "answer": 0}))
    with closing(
        make_task("jsonl", path=str(path), test_path=str(test), prompt_field="messages")
    ) as task:
        problem = task.problem("test", 0)
        assert problem.asked == CONVERSATION and problem.question == "2 + 1 ="
        assert problem.prompt == "system: 0\n\nuser: 1 + 1 =\n\nassistant: 2\n\nuser: 2 + 1 ="
        assert given(world / "student", problem.asked) == given(world / "student", CONVERSATION)
        first = task.problem("train", 0)
        assert first.prompt == first.question == f"{first.answer} ="
