"""Teachers made of teachers: one for each task, a mixture, and one that sees more than the
student."""

import itertools
import json
import math
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import rlad
from rlad.config.catalogue import CONFIGS, describe
from rlad.config.file import parse_config
from rlad.config.run import RolloutConfig, RunConfig
from rlad.config.template import fill_template, template_names
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.loading import LanguageModel, load_language_model
from rlad.models.without_weights import load_tokenizer
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.types import Completion, Rollout
from rlad.runs.directory import RunDirectory
from rlad.tasks import Problem
from rlad.teachers import check_teacher, make_teacher
from rlad.teachers.base import Setting, SynchronousTeacher, Teacher, TeacherRequest
from rlad.teachers.ema import EMATeacher
from rlad.teachers.local import LocalTeacher
from rlad.teachers.privileged import PrivilegedTeacher, peer_solution, privileged_prompt
from rlad.teachers.several import TeacherByTask, TeacherMixture
from tiny_models import VOCABULARY, random_tokens, tiny_language_model, tiny_tokenizer
from tiny_runs import FILES, OFTEN_CORRECT, run_config, write_model

TEMPERATURE = 0.7
DOCS = Path(__file__).parents[2] / "docs"


def local(model: LanguageModel, name: str = "") -> LocalTeacher:
    named = replace(model, name=name or model.name)
    return LocalTeacher(named, temperature=TEMPERATURE, tokens_per_batch=64)


def requests_for(*tasks: str) -> list[TeacherRequest]:
    lengths = [(1 + 3 * i) % 8 + 1 for i in range(len(tasks))]
    pairs = zip(
        random_tokens(*lengths), random_tokens(*reversed(lengths), seed=1), tasks, strict=True
    )
    return [TeacherRequest(p, c, Problem("", "", "", task=task)) for p, c, task in pairs]


def reference(model: LanguageModel, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-probs of one completion from the full logits of one sequence, float64 `[its length]`."""
    with torch.no_grad():
        logits = (
            model.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
            / TEMPERATURE
        )
    start = len(prompt) - 1
    rows = logits.log_softmax(dim=-1)[start : start + len(completion)]
    return rows.gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def setting(config: dict[str, Any] | RunConfig, context: int | None = 256) -> Setting:
    run = config if isinstance(config, RunConfig) else parse_config(config)
    return Setting(run, load_tokenizer(run.student.model), context)


def errors(findings: Sequence[Finding], level: str = "error") -> list[tuple[str, str]]:
    return [(finding.subject, finding.message) for finding in findings if finding.level == level]


def test_teachers_share_no_table_that_one_could_fill():
    with pytest.raises(TypeError):
        Teacher.inner[""] = local(tiny_language_model())  # pyright: ignore[reportIndexIssue]


# --- a teacher for each task ----------------------------------------------------------------------


def test_each_request_goes_to_the_teacher_of_its_task():
    models = {"a": tiny_language_model(seed=1), "b": tiny_language_model("gpt2", seed=2)}
    teacher = TeacherByTask({name: local(model) for name, model in models.items()})
    requests = requests_for("b", "a", "a", "b", "a")
    found = teacher.logprobs(requests)
    for request, values in zip(requests, found, strict=True):
        assert request.problem is not None
        wanted = reference(models[request.problem.task], request.prompt, request.completion)
        torch.testing.assert_close(values.double(), wanted, atol=1e-4, rtol=0)
    other = TeacherByTask({"a": local(models["b"]), "b": local(models["a"])}).logprobs(requests)
    assert all((x - y).abs().max() > 0.1 for x, y in zip(found, other, strict=True))


def test_the_only_task_of_a_run_is_asked_for_by_its_type():
    teacher = TeacherByTask({"jsonl": local(tiny_language_model())}, only_task="jsonl")
    assert [len(values) for values in teacher.logprobs(requests_for("", ""))] == [5, 2]


def test_identity_names_all_members_in_any_order():
    a, b = (local(tiny_language_model(), name) for name in "ab")
    assert (
        TeacherByTask({"x": a, "y": b}).identity
        == TeacherByTask({"y": b, "x": a}).identity
        == "by task: x = a, y = b"
    )
    mixed = TeacherMixture({"y": b, "x": a}, {"x": 1, "y": 3}).identity
    assert (
        mixed
        == TeacherMixture({"x": a, "y": b}, {"x": 2, "y": 6}).identity
        == "mixture: 0.25 x x = a, 0.75 x y = b"
    )


# --- a mixture ------------------------------------------------------------------------------------


def test_mixture_is_the_logarithm_of_the_weighted_mean_probability():
    models, weights = [tiny_language_model(seed=seed) for seed in (1, 2, 3)], [2.0, 1.0, 5.0]
    members = {str(i): local(model) for i, model in enumerate(models)}
    teacher = TeacherMixture(members, dict(zip(members, weights, strict=True)))
    requests = requests_for("", "", "")
    for request, values in zip(requests, teacher.logprobs(requests), strict=True):
        for t, value in enumerate(values.tolist()):
            each = [
                float(reference(model, request.prompt, request.completion)[t]) for model in models
            ]
            wanted = math.log(
                sum(w / 8 * math.exp(one) for w, one in zip(weights, each, strict=True))
            )
            assert value == pytest.approx(wanted, abs=1e-4)


def test_mixture_is_a_probability_whatever_the_weights_sum_to():
    teacher = TeacherMixture(
        {"a": local(tiny_language_model(seed=1)), "b": local(tiny_language_model(seed=2))},
        {"a": 9, "b": 3},
    )
    every_token = [TeacherRequest([5, 9], [token]) for token in range(VOCABULARY)]
    assert float(torch.cat(teacher.logprobs(every_token)).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_limits_of_a_mixture():
    a, b = local(tiny_language_model(seed=1)), local(tiny_language_model(seed=2))
    requests = requests_for("", "")
    for mixed, alone in (
        (TeacherMixture({"a": a, "same": a}, {"a": 1, "same": 4}), a),
        (TeacherMixture({"a": a, "b": b}, {"a": 1, "b": 1e-30}), a),
    ):
        for found, wanted in zip(mixed.logprobs(requests), alone.logprobs(requests), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_what_one_member_cannot_score_is_missing():
    """The second one knows 32 ids; token 40 of the completion is none of them, and what follows
    cannot be scored either."""
    members = {
        "a": local(tiny_language_model(seed=1)),
        "b": local(tiny_language_model(seed=2, vocab_size=32)),
    }
    request = TeacherRequest([5, 9], [7, 8, 40, 9])
    (values,) = TeacherMixture(members, {"a": 1, "b": 1}).logprobs([request])
    assert values.isfinite().tolist() == [True, True, False, False] and values[2:].isnan().all()


# --- members move, are stored and closed ----------------------------------------------------------


class Recording(SynchronousTeacher):
    """Notes what is called."""

    def __init__(self, name: str):
        self.identity = name
        self.calls: list[str] = []

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        return [torch.zeros(len(request.completion)) for request in requests]

    def after_step(self) -> None:
        self.calls.append("step")

    def pop_metrics(self) -> dict[str, float]:
        return {"teacher/x/frac": 0.5}

    def cancel(self) -> None:
        self.calls.append("cancel")

    def close(self) -> None:
        self.calls.append("close")


def test_all_members_move_are_stored_under_their_names_and_closed():
    student = tiny_language_model()
    make: Callable[..., EMATeacher] = partial(
        EMATeacher, name="s", temperature=1.0, tokens_per_batch=64
    )
    members = {
        "a": make(student, update_rate=0.5),
        "a/b": make(student, update_rate=0.1),
        "c": Recording("c"),
    }
    teacher = TeacherMixture(members, dict.fromkeys(members, 1.0))
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(1)
    teacher.after_step()
    state = {name: value.clone() for name, value in teacher.state().items()}
    assert {name.split("/")[0] for name in state} == {"a", "a%2Fb"} and len(state) == 42
    fresh = {
        "a": make(student, update_rate=0.5),
        "a/b": make(student, update_rate=0.1),
        "c": Recording("c"),
    }
    restored = TeacherMixture(fresh, dict.fromkeys(fresh, 1.0))
    restored.load_state(state)
    requests = requests_for("", "")
    assert all(map(torch.equal, restored.logprobs(requests), teacher.logprobs(requests)))
    assert teacher.pop_metrics() == {"teacher/c/x/frac": 0.5}
    teacher.cancel()
    teacher.close()
    assert members["c"].calls == ["step", "cancel", "close"]


def test_the_privileged_one_passes_everything_on():
    student, recording = tiny_language_model(), Recording("r")
    inner = EMATeacher(student, name="s", update_rate=0.5, temperature=1.0, tokens_per_batch=64)
    teacher = PrivilegedTeacher(inner, "{prompt}{answer}", encode=lambda text: [3], context=None)
    state = {name: value + 1 for name, value in teacher.state().items()}
    teacher.load_state(state)
    assert len(state) == 21 and all(
        torch.equal(inner.state()[name], value) for name, value in state.items()
    )
    teacher = PrivilegedTeacher(
        recording, "{prompt}{answer}", encode=lambda text: [3], context=None
    )
    teacher.after_step()
    teacher.cancel()
    teacher.close()
    assert recording.calls == ["step", "cancel", "close"] and teacher.pop_metrics() == {
        "teacher/x/frac": 0.5
    }
    assert teacher.identity == "r, privileged by '{prompt}{answer}'"


# --- several teachers: check and run --------------------------------------------------------------


def two_tasks(world: Path, run_dir: Path, **teacher: Any) -> dict[str, Any]:
    one = {
        "type": "jsonl",
        "verifier": "number",
        **{name: str(world / f"{name}.jsonl") for name in FILES},
    }
    tasks = {"type": "several", "tasks": {"a": one, "b": one}}
    return run_config(world, run_dir) | {"task": tasks, "teacher": {"type": "several", **teacher}}


def test_a_task_without_a_teacher_is_an_error_before_the_run(world, tmp_path):
    members = {"a": {"model": str(world / "teacher")}, "c": {"model": str(world / "student")}}
    config = two_tasks(world, tmp_path / "run", teachers=members)
    findings = check_teacher(parse_config(config).teacher, setting(config))
    assert errors(findings) == [
        (
            "teachers",
            "task 'b' has no teacher of that name; add [teacher.teachers.b], or rename one of a, "
            "c.",
        )
    ]
    assert errors(findings, "warning") == [
        ("teachers", "teacher 'c' is never asked: the run's tasks are a, b; remove or rename it.")
    ]
    assert {finding.subject for finding in findings if finding.level == "ok"} >= {
        "a: vocabulary",
        "c: context",
    }
    with pytest.raises(UserError, match="task 'b' has no teacher of that name"):
        rlad.train(config)
    assert not (tmp_path / "run").exists()


def test_members_are_checked_each(world, tmp_path):
    write_model(tmp_path / "short", seed=1, max_position_embeddings=16)
    members = {"a": {"model": str(tmp_path / "short")}, "b": {"model": "/nowhere"}}
    config = two_tasks(world, tmp_path / "run", teachers=members)
    (context, missing) = errors(check_teacher(parse_config(config).teacher, setting(config)))
    assert context[0] == "a: context" and "its context of 16 tokens is shorter" in context[1]
    assert missing[0] == "b: teacher" and "'/nowhere' cannot be found" in missing[1]


def step_1(config: dict[str, Any]) -> dict[str, float]:
    return next(iter(RunDirectory(rlad.train(config).run_dir).read("metrics.jsonl")))


def test_runs_with_several_teachers(world, tmp_path):
    """Two that are one are that teacher, combined either way; two that differ have a say in one
    task each, or in both."""
    write_model(tmp_path / "other", seed=7)
    paths, norms = [str(world / "teacher"), str(tmp_path / "other")], {}
    for combine, a, b in (
        ("by_task", 0, 0),
        ("by_task", 0, 1),
        ("by_task", 1, 0),
        ("mixture", 0, 0),
        ("mixture", 0, 1),
    ):
        members = {"a": {"model": paths[a]}, "b": {"model": paths[b]}}
        config = two_tasks(world, tmp_path / f"{combine}{a}{b}", teachers=members, combine=combine)
        config |= {"optimization": {"num_steps": 1}, "objective": {"type": "opd"}}
        norms[combine, a, b] = step_1(config)["optimization/gradient_norm"]
    assert norms.pop(("mixture", 0, 0)) == pytest.approx(norms["by_task", 0, 0], rel=1e-5)
    assert len({round(norm, 4) for norm in norms.values()}) == 4


# --- templates ------------------------------------------------------------------------------------


def test_a_template_by_hand():
    template = "{{{prompt}}} is {answer}."
    assert template_names(template) == {"prompt", "answer"}
    values = {"prompt": "{answer} {0.__class__} }{", "answer": "{prompt}"}
    assert fill_template(template, values) == "{{answer} {0.__class__} }{} is {prompt}."


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{prompt", "the braces of its template do not match"),
        ("{prompt} }", "the braces of its template do not match"),
        ("{prompt!r}", "or have more than a name between them; write {prompt} for a name"),
        ("{prompt:>9}", "or have more than a name between them; write {prompt} for a name"),
        (
            "The answer is {answer}.",
            "its template has no {prompt}, so the teacher would not see the question; add it.",
        ),
    ],
)
def test_templates_that_cannot_be(world, tmp_path, template, sentence):
    teacher = {"type": "privileged", "template": template, "teacher": {"model": "t"}}
    with pytest.raises(UserError) as error:
        parse_config(run_config(world, tmp_path) | {"teacher": teacher})
    assert str(error.value).startswith("teacher is wrong: ") and sentence in str(error.value)


def test_what_a_template_may_name():
    problem = Problem(
        "p", "a", "k", metadata={"hint": "h", "size": 3, "names": ["x"], "prompt": "no"}
    )
    assert (
        privileged_prompt("{prompt}/{answer}/{hint}/{size}/{peer_solution}", problem, "s")
        == "p/a/h/3/s"
    )
    for template in ("{prompt}{names}", "{prompt}{nothing}", "{prompt}{peer_solution}"):
        assert privileged_prompt(template, problem, None) is None
    assert privileged_prompt("{prompt}{answer}", replace(problem, answer=""), None) is None
    assert privileged_prompt("{prompt}{answer}", None, None) is None


# --- privileged: alignment ------------------------------------------------------------------------


def tokenizers() -> dict[str, Any]:
    """Plain, with a first token of its own, and with a chat template that also ends the user's
    turn."""
    chosen = {name: tiny_tokenizer() for name in ("plain", "bos", "chat")}
    chosen["bos"].backend_tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<eos2> $A", special_tokens=[("<eos2>", 2)]
    )
    turn = "{% for m in messages %}<eos2> w3 {{ m['content'] }} w4{% endfor %}"
    chosen["chat"].chat_template = turn + "{% if add_generation_prompt %} w5 w6{% endif %}"
    return chosen


def words(length: int, seed: int) -> str:
    return " ".join(f"w{token}" for token in random_tokens(length, seed=seed)[0])


def problems() -> list[Problem]:
    """Prompts and answers of very different lengths."""
    return [
        Problem(words(2 + 3 * i, i), words(11 - 2 * i, 50 + i), str(i), metadata={"short": "w9"})
        for i in range(5)
    ]


def asked(tokenizer: Any) -> list[TeacherRequest]:
    completions = random_tokens(6, 1, 9, 3, 4, seed=3)
    prompts = [
        prompt_token_ids(tokenizer, problem.prompt, RolloutConfig()) for problem in problems()
    ]
    peers = [(), (peer("w7"),), (peer("w1", "wrong"),), (peer("w8 w8"), peer("w3")), (peer("w9"),)]
    return [
        TeacherRequest(prompt, completion, problem, None, others)
        for prompt, completion, problem, others in zip(
            prompts, completions, problems(), peers, strict=True
        )
    ]


def peer(text: str, verdict: str = "correct") -> Rollout:
    return Rollout(Completion((), (), False), text, verdict, float(verdict == "correct"))


def privileged(
    inner: Teacher, tokenizer: Any, template: str, context: int | None = None
) -> PrivilegedTeacher:
    return PrivilegedTeacher(
        inner,
        template,
        encode=partial(prompt_token_ids, tokenizer, rollout=RolloutConfig()),
        context=context,
    )


@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
def test_the_students_own_prompt_gives_the_plain_teachers_values_bit_for_bit(kind):
    tokenizer, inner = tokenizers()[kind], local(tiny_language_model(seed=4))
    requests = asked(tokenizer)
    found = privileged(inner, tokenizer, "{prompt}").logprobs(requests)
    assert all(map(torch.equal, found, inner.logprobs(requests)))


@pytest.mark.parametrize("kind", ["plain", "bos", "chat"])
@pytest.mark.parametrize(
    "template", ["w5 {answer} w6 {prompt}", "{prompt} {answer} w8", "{short} {prompt}"]
)
def test_another_prompt_shifts_no_token(kind, template):
    """Against a forward pass of its own over [privileged prompt + completion], one sequence at a
    time."""
    tokenizer, model = tokenizers()[kind], tiny_language_model(seed=4)
    requests = asked(tokenizer)
    found = privileged(local(model), tokenizer, template).logprobs(requests)
    before, behind = {"plain": ([], []), "bos": ([2], []), "chat": ([2, 3], [4, 5, 6])}[kind]
    for request, values in zip(requests, found, strict=True):
        assert request.problem is not None
        text = template.replace("{prompt}", request.problem.prompt).replace(
            "{answer}", request.problem.answer
        )
        ids = [int(word[1:]) for word in text.replace("{short}", "w9").split()]
        wanted = reference(model, [*before, *ids, *behind], request.completion)
        torch.testing.assert_close(values.double(), wanted, atol=1e-4, rtol=0)
        assert (
            values.double() - reference(model, request.prompt, request.completion)
        ).abs().max() > 0.1


def test_a_shorter_prompt_shifts_no_token():
    """The student saw 20 tokens, the teacher sees 2."""
    model = tiny_language_model(seed=4)
    problem, prompt = Problem("w3", "w4", "k"), random_tokens(20)[0]
    teacher = privileged(local(model), tiny_tokenizer(), "{prompt} {answer}")
    (values,) = teacher.logprobs([TeacherRequest(prompt, [9, 10, 11], problem)])
    torch.testing.assert_close(
        values.double(), reference(model, [3, 4], [9, 10, 11]), atol=1e-4, rtol=0
    )


def test_without_a_peer_solution_the_teacher_has_the_students_prompt():
    tokenizer, model = tiny_tokenizer(), tiny_language_model(seed=4)
    requests, teacher = (
        asked(tokenizer),
        privileged(local(model), tokenizer, "{peer_solution} {prompt}"),
    )
    found, plain = teacher.logprobs(requests), local(model).logprobs(requests)
    for request, values, own in zip(requests, found, plain, strict=True):
        shown = [int(word[1:]) for word in (peer_solution(request) or "").split()]
        torch.testing.assert_close(
            values.double(),
            reference(model, [*shown, *request.prompt], request.completion),
            atol=1e-4,
            rtol=0,
        )
        assert (values - own).abs().max() < 1e-4 or shown
    assert teacher.pop_metrics() == {"teacher/privileged/frac": 0.6} and teacher.pop_metrics() == {}


def test_a_peer_solution_is_another_one():
    """Not the completion's own text, however it was thought of; of an own text that is all thought
    any other is another."""
    copies = (peer("<think> w4 </think> w7"), peer("w7 "), peer("w8", "wrong"))
    for own in (peer("<think> w5 </think> w7"), peer("w7")):
        asked = TeacherRequest((3,), (4,), next(iter(problems())), own, copies)
        assert peer_solution(asked) is None
        assert peer_solution(replace(asked, peers=(*copies, peer("w9")))) == "w9"
    asked = TeacherRequest((3,), (4,), None, peer("<think> w5", "wrong"), copies)
    assert peer_solution(asked) == copies[0].text


def test_what_does_not_fit_is_missing_and_the_others_are_scored():
    tokenizer, model = tiny_tokenizer(), tiny_language_model(seed=4)
    requests = asked(tokenizer)
    whole = privileged(local(model), tokenizer, "{answer} {prompt}").logprobs(requests)
    lengths = [
        len(r.problem.answer.split()) + len(r.prompt) + len(r.completion)
        for r in requests
        if r.problem
    ]
    assert lengths == [2 + 11 + 6, 5 + 9 + 1, 8 + 7 + 9, 11 + 5 + 3, 14 + 3 + 4]
    for limit, fit in ((24, 5), (20, 3), (14, 0)):
        found = privileged(local(model), tokenizer, "{answer} {prompt}", context=limit).logprobs(
            requests
        )
        for values, wanted, length in zip(found, whole, lengths, strict=True):
            assert len(values) == len(wanted)
            assert values.isfinite().all() if length <= limit else values.isnan().all()
        assert sum(bool(values.isfinite().all()) for values in found) == fit


# --- privileged: check ----------------------------------------------------------------------------


def privileged_config(world: Path, run_dir: Path, template: str, **sections: Any) -> dict[str, Any]:
    teacher = {
        "type": "privileged",
        "template": template,
        "teacher": {"model": str(world / "teacher")},
    }
    return run_config(world, run_dir, **sections) | {"teacher": teacher}


def check(config: dict[str, Any], level: str) -> list[tuple[str, str]]:
    return errors(check_teacher(parse_config(config).teacher, setting(config)), level)


def test_names_of_a_template_are_checked(world, tmp_path):
    (message,) = check(privileged_config(world, tmp_path, "{prompt} {anser}"), "error")
    sentence = (
        "its template names {anser}, which the task's problems do not have; use {answer}, "
        "{peer_solution}, {prompt}."
    )
    assert message == ("template", sentence)
    (message,) = check(privileged_config(world, tmp_path, "= {prompt}"), "warning")
    assert message[0] == "template" and "nothing but the prompt" in message[1]
    assert check(privileged_config(world, tmp_path, "{answer} {prompt}"), "warning") == []


def with_hints(world: Path, folder: Path, *hints: str) -> dict[str, Any]:
    """The problems of `world`, with these hints in turn, no field where it is empty."""
    rows = [json.loads(line) for line in (world / "path.jsonl").read_text().splitlines()]
    hinted = [
        row | ({"hint": hint} if hint else {})
        for row, hint in zip(rows, itertools.cycle(hints), strict=False)
    ]
    path = folder / f"hints-{'-'.join(hints)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in hinted))
    return {"path": str(path)}


def test_a_hint_that_some_problems_lack_is_a_warning(world, tmp_path):
    config = privileged_config(
        world, tmp_path, "{hint} {prompt}", task=with_hints(world, tmp_path, "1", "2", "")
    )
    (message,) = check(config, "warning")
    assert re.fullmatch(
        r"\d of 20 problems have no \{hint\}: the teacher is given the student's prompt there",
        message[1],
    )
    config["task"] |= with_hints(world, tmp_path, "1", "2")
    assert check(config, "warning") == [] == check(config, "error")


def test_a_template_whose_names_no_problem_has_is_an_error(world, tmp_path):
    """Of an environment's problems none has an answer."""
    config = privileged_config(world, tmp_path, "{answer} {prompt}")
    config["task"] = {"type": "environment", "path": "tiny_environments:Adding"}
    ((subject, sentence),) = check(config, "error")
    assert subject == "template" and "{answer}, which none of the 20 problems looked" in sentence


def test_the_longest_privileged_prompt_must_fit_with_its_completion(world, tmp_path):
    """A prompt of 4 tokens, 1 for the answer and 4 of completion; a peer's solution is another
    4."""
    for context, template, level in (
        (9, "{answer} {prompt}", "ok"),
        (8, "{answer} {prompt}", "error"),
        (12, "{peer_solution} {prompt}", "warning"),
        (13, "{peer_solution} {prompt}", "ok"),
    ):
        teacher = tmp_path / f"context{context}"
        write_model(teacher, seed=2, max_position_embeddings=context)
        rollout = {"max_prompt_tokens": 4}
        config = privileged_config(world, tmp_path, template, rollout=rollout)
        config["teacher"]["teacher"] = {"model": str(teacher)}
        levels = {
            f.subject: f.level for f in check_teacher(parse_config(config).teacher, setting(config))
        }
        assert levels["privileged context"] == level, (context, template)


def test_privileged_in_privileged_is_refused(world, tmp_path):
    config = privileged_config(world, tmp_path, "{prompt}")
    config["teacher"] = config["teacher"] | {"teacher": config["teacher"]}
    with pytest.raises(UserError, match="its teacher is privileged too"):
        parse_config(config)


# --- privileged: runs -----------------------------------------------------------------------------


def documented_example() -> dict[str, Any]:
    """The [teacher] and [objective] sections that docs/methods.md shows for RLSD's own teacher."""
    blocks = re.findall(
        r"^```toml\n(.*?)^```", (DOCS / "methods.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    (block,) = [block for block in blocks if 'type = "rlsd"' in block and "privileged" in block]
    return tomllib.loads(block)


@pytest.mark.parametrize("objective", ["rlsd", "opd", "trrd"])
def test_the_documented_teacher_trains_and_its_answer_is_in_the_gradient(
    world, tmp_path, objective
):
    """Two runs that differ in the answers in the teacher's prompt alone: equal rollouts and
    rewards, another gradient."""
    example = documented_example()
    assert example["objective"]["type"] == "rlsd" and example["teacher"]["teacher"] == {
        "type": "ema",
        "update_rate": 1,
    }
    teacher = example["teacher"] | {
        "template": example["teacher"]["template"].replace("{answer}", "{hint}")
    }
    seen = []
    for run, hints in (("same", "12"), ("again", "12"), ("other", "20")):
        config = run_config(
            world,
            tmp_path / run,
            task=with_hints(world, tmp_path, *hints) | OFTEN_CORRECT,
            optimization={"num_steps": 1},
        )
        row = step_1(config | {"teacher": teacher, "objective": {"type": objective}})
        (sample,) = RunDirectory(tmp_path / run).read("samples.jsonl")
        texts = [rollout["text"] for rollout in sample["rollouts"]]
        seen.append((texts, row["reward/mean"], row["optimization/gradient_norm"]))
        assert row["teacher/privileged/frac"] == 1
    same, again, other = seen
    assert same == again
    assert same[:2] == other[:2] and abs(same[2] - other[2]) > 1e-4 * same[2]


def test_a_student_that_teaches_itself_its_own_prompt_is_grpo(world, tmp_path):
    """The limit of a template that tells nothing: the log-ratio to the teacher is 0, so TRRD's
    ratio is GRPO's."""
    teacher = {
        "type": "privileged",
        "template": "{prompt}",
        "teacher": {"type": "ema", "update_rate": 1.0},
    }
    rows = {}
    for name in ("trrd", "rlsd", "grpo"):
        config = run_config(world, tmp_path / name, task=OFTEN_CORRECT) | {
            "teacher": teacher,
            "objective": {"type": name},
        }
        rows[name] = list(RunDirectory(rlad.train(config).run_dir).read("metrics.jsonl"))
    for name in ("trrd", "rlsd"):
        for row, wanted in zip(rows[name], rows["grpo"], strict=True):
            assert row["teacher/log_ratio/mean"] == pytest.approx(0, abs=1e-5)
            assert row["optimization/gradient_norm"] == pytest.approx(
                wanted["optimization/gradient_norm"], rel=1e-4
            )


def test_make_teacher_builds_what_the_sections_say(world, tmp_path):
    member = {
        "type": "privileged",
        "template": "{answer} {prompt}",
        "teacher": {"model": str(world / "teacher")},
    }
    config = two_tasks(world, tmp_path, teachers={"a": {"type": "ema"}, "b": member})
    run = parse_config(config)
    where = replace(
        setting(run), student=load_language_model(run.student.model, device="cpu", trainable=True)
    )
    teacher = make_teacher(run.teacher, where)
    assert teacher.identity == (
        f"by task: a = the moving average of {world / 'student'} (update rate 0.05), "
        f"b = {world / 'teacher'}, privileged by '{{answer}} {{prompt}}'"
    )
    teacher.close()


# --- rlad list ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS["teachers"])
def test_every_type_is_shown_as_it_stands_in_a_config(name):
    """What is shown is TOML (but for the dots of required settings), with a section of its own for
    each inner teacher."""
    text = describe("teachers", name)
    shown = tomllib.loads(text[text.index("[teacher]") :].replace("= ...", "= 0"))["teacher"]
    assert shown["type"] == name
    inner = {
        "several": {"teachers": {"NAME": {"type": 0}}},
        "privileged": {"teacher": {"type": 0}},
        "cached": {"teacher": {"type": 0}},
    }
    assert {key: value for key, value in shown.items() if key.startswith("teacher")} == inner.get(
        name, {}
    )
    hidden = {key for key in CONFIGS["teachers"][name].model_fields if f"# {key} " in text}
    assert shown.keys() | hidden == CONFIGS["teachers"][name].model_fields.keys()
