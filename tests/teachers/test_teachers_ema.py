"""The student's moving average: worked by hand, exact resume, ties, buffers, adapters."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlad
import rlad.training.run
from rlad.config.file import parse_config
from rlad.config.teacher import EMATeacherConfig
from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.runs.checkpoints import write_manifest
from rlad.runs.directory import RunDirectory
from rlad.scoring.scorer import Scorer
from rlad.stopping import StopRequested
from rlad.teachers import check_teacher
from rlad.teachers.base import Setting, TeacherRequest
from rlad.teachers.ema import EMATeacher
from tiny_models import random_tokens, tiny_language_model, tiny_model
from tiny_runs import OFTEN_CORRECT, remains, run_config

TEMPERATURE = 0.7
REQUESTS = [
    TeacherRequest(p, c)
    for p, c in zip(random_tokens(3, 5, 2), random_tokens(4, 1, 7, seed=1), strict=True)
]


def ema(student: LanguageModel, update_rate: float) -> EMATeacher:
    return EMATeacher(
        student, name="s", update_rate=update_rate, temperature=TEMPERATURE, tokens_per_batch=64
    )


def scores(model: LanguageModel) -> list[torch.Tensor]:
    scorer = Scorer(model, temperature=TEMPERATURE, tokens_per_batch=64)
    return scorer.score([r.prompt for r in REQUESTS], [r.completion for r in REQUESTS])


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, found, wanted))


def move_to(student: LanguageModel, seed: int) -> list[torch.Tensor]:
    """Give the student other weights; returns them in float64."""
    other = tiny_model(seed=seed, tie_word_embeddings=student.model.config.tie_word_embeddings)
    student.model.load_state_dict(other.state_dict())
    return [weight.detach().double() for weight in other.parameters()]


@pytest.mark.parametrize("is_tied", [False, True])
def test_two_steps_by_hand(is_tied):
    """t0 = x0; t1 = x0 + r (x1 - x0); t2 = t1 + r (x2 - t1) = (1-r)^2 x0 + r (1-r) x1 + r x2."""
    student, r = tiny_language_model(seed=0, tie_word_embeddings=is_tied), 0.3
    x0 = [weight.detach().double() for weight in student.model.parameters()]
    teacher = ema(student, r)
    x1 = move_to(student, 1)
    teacher.after_step()
    x2 = move_to(student, 2)
    teacher.after_step()
    wanted = [
        (1 - r) ** 2 * a + r * (1 - r) * b + r * c for a, b, c in zip(x0, x1, x2, strict=True)
    ]
    found = teacher.state()
    assert list(found) == [name for name, _ in student.model.named_parameters()]
    assert ("lm_head.weight" in found) is not is_tied
    for mine, value in zip(found.values(), wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), value, atol=1e-6, rtol=0)
    average = tiny_language_model(seed=9, tie_word_embeddings=is_tied)
    with torch.no_grad():
        for weight, value in zip(average.model.parameters(), wanted, strict=True):
            weight.copy_(value)
    for mine, theirs in zip(teacher.logprobs(REQUESTS), scores(average), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
    assert all(weight.requires_grad for weight in student.model.parameters())


def test_rate_0_stays_the_initial_student_and_rate_1_is_the_present_one():
    student = tiny_language_model()
    first = scores(student)
    still, follows, average = ema(student, 0), ema(student, 1), ema(student, 0.5)
    assert equal(still.logprobs(REQUESTS), first) and equal(follows.logprobs(REQUESTS), first)
    move_to(student, 1)
    for teacher in (still, follows, average):
        teacher.after_step()
    assert equal(still.logprobs(REQUESTS), first)
    assert equal(follows.logprobs(REQUESTS), scores(student)) and not equal(scores(student), first)
    assert not equal(average.logprobs(REQUESTS), first) and not equal(
        average.logprobs(REQUESTS), scores(student)
    )
    assert follows.state() == {} and len(still.state()) == len(list(student.model.parameters()))


def test_buffers_are_the_students_and_not_shared():
    student = tiny_language_model()
    student.model.model.register_buffer("constant", torch.tensor([3.0]))
    teacher = ema(student, 0.5)
    teacher.after_step()
    copied = dict(teacher.scorer.model.named_buffers())
    for name, buffer in student.model.named_buffers():
        assert torch.equal(copied[name], buffer) and copied[name].data_ptr() != buffer.data_ptr()
    assert "model.constant" not in teacher.state()


def test_only_trained_weights_are_averaged_and_stored_the_others_are_shared():
    """As with an adapter over frozen weights."""
    student = tiny_language_model()
    for name, weight in student.model.named_parameters():
        weight.requires_grad_("q_proj" in name)
    teacher = ema(student, 0.5)
    trained = {
        name: weight for name, weight in student.model.named_parameters() if weight.requires_grad
    }
    copies = dict(teacher.scorer.model.named_parameters())
    assert set(teacher.state()) == set(trained) and len(trained) == 2
    for name, weight in student.model.named_parameters():
        assert (copies[name].data_ptr() == weight.data_ptr()) is (name not in trained)
    with torch.no_grad():
        before = {name: weight.clone() for name, weight in trained.items()}
        for weight in trained.values():
            weight.add_(1)
    teacher.after_step()
    for name, value in teacher.state().items():
        torch.testing.assert_close(value, before[name] + 0.5)
    assert all(weight.requires_grad for weight in trained.values())


@pytest.mark.peft
def test_a_lora_student_has_an_averaged_adapter(world, tmp_path):
    """Resumed bit for bit too; the base weights are in no checkpoint."""
    pytest.importorskip("peft", reason="the optional package peft is not installed")
    folders = []
    for name, stops in (("whole", ()), ("stopped", (1, 4))):
        config = ema_run(world, tmp_path / name / "run", 0.2)
        config["student"] |= {"lora": {"rank": 2, "alpha": 4}}
        for resumed, step in enumerate(stops):
            with pytest.raises(StopRequested):
                rlad.train(config, resume=resumed > 0, reporter=StopBehind(step))
        rlad.train(config, resume=bool(stops))
        folders.append(RunDirectory(tmp_path / name / "run").checkpoints()[-1][1])
    whole, stopped = (load_file(folder / "trainer" / "teacher.safetensors") for folder in folders)
    student = load_file(folders[0] / "adapter_model.safetensors")
    assert len(whole) == len(student) and all("lora" in name for name in whole)
    assert whole.keys() == stopped.keys() and all(
        torch.equal(whole[name], stopped[name]) for name in whole
    )
    moved = [name for name in whole if "lora_B" in name]
    assert moved and all(float(whole[name].abs().max()) > 0 for name in moved)
    sizes = (
        sum(float(value.norm()) for name, value in state.items() if "lora_B" in name)
        for state in (whole, student)
    )
    assert next(sizes) < next(sizes)


def test_a_bfloat16_student_has_a_float32_average_that_computes_as_it_does():
    student = replace(tiny_language_model(), compute_dtype=torch.bfloat16)
    teacher = ema(student, 0.1)
    assert {value.dtype for value in teacher.state().values()} == {torch.float32}
    assert equal(teacher.logprobs(REQUESTS), scores(student))


# --- state ----------------------------------------------------------------------------------------


def test_state_brings_back_the_average_whatever_the_student_is():
    student = tiny_language_model()
    teacher = ema(student, 0.3)
    move_to(student, 1)
    teacher.after_step()
    restored = ema(tiny_language_model(seed=1), 0.3)
    assert not equal(restored.logprobs(REQUESTS), teacher.logprobs(REQUESTS))
    restored.load_state({name: value.clone() for name, value in teacher.state().items()})
    assert equal(restored.logprobs(REQUESTS), teacher.logprobs(REQUESTS))


def test_a_state_that_is_not_whole_is_refused():
    teacher = ema(tiny_language_model(), 0.3)
    whole = {name: value.clone() for name, value in teacher.state().items()}
    name = next(iter(whole))
    for state in (
        {},
        {n: v for n, v in whole.items() if n != name},
        whole | {name: whole[name][:1]},
        whole | {"x": whole[name]},
    ):
        with pytest.raises(
            ValueError,
            match=r"does not have the 21 weights of the moving average of s \(update rate 0.3\)",
        ):
            teacher.load_state(state)
    with pytest.raises(UserError, match="does not have the 0 weights"):
        ema(tiny_language_model(), 1).load_state(whole)


class StopBehind(rlad.training.reporter.Reporter):
    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, result: Any, num_steps: int) -> None:
        if result.step == self.at:
            raise StopRequested(2)


def ema_run(world, run_dir, update_rate: float) -> dict[str, Any]:
    optimization = {"num_steps": 6, "steps_per_rollout_batch": 2, "learning_rate": 3e-2}
    config = run_config(world, run_dir, optimization=optimization, task=OFTEN_CORRECT)
    privileged = {"type": "privileged", "template": "{answer} = {prompt}"}
    return config | {
        "teacher": privileged | {"teacher": {"type": "ema", "update_rate": update_rate}}
    }


@pytest.mark.parametrize("update_rate", [0.0, 0.2, 1.0])
def test_an_interrupted_run_resumes_bit_for_bit(world, tmp_path, update_rate):
    """Between the mini-batches of a rollout batch, and between two batches."""
    whole, stopped = (
        ema_run(world, tmp_path / name / "run", update_rate) for name in ("whole", "stopped")
    )
    rlad.train(whole)
    for resumed, step in enumerate((1, 4)):
        with pytest.raises(StopRequested):
            rlad.train(stopped, resume=resumed > 0, reporter=StopBehind(step))
    rlad.train(stopped, resume=True)
    found, wanted = remains(tmp_path / "stopped" / "run"), remains(tmp_path / "whole" / "run")
    assert (
        found.keys() == wanted.keys()
        and [name for name in wanted if found[name] != wanted[name]] == []
    )
    _, last = RunDirectory(tmp_path / "whole" / "run").checkpoints()[-1]
    assert (last / "trainer" / "teacher.safetensors").is_file() is (update_rate < 1)
    if update_rate < 1:
        teacher, student, initial = (
            load_file(path / name)["model.norm.weight"]
            for path, name in (
                (last, "trainer/teacher.safetensors"),
                (last, "model.safetensors"),
                (world / "student", "model.safetensors"),
            )
        )
        assert not torch.equal(teacher, student) and torch.equal(teacher, initial) is (
            update_rate == 0
        )


def test_a_checkpoint_without_the_average_is_refused_and_identity_names_the_initial_student(
    world, tmp_path
):
    config = ema_run(world, tmp_path / "run", 0.2)
    with pytest.raises(StopRequested):
        rlad.train(config, reporter=StopBehind(3))
    _, folder = RunDirectory(tmp_path / "run").checkpoints()[-1]
    state = json.loads((folder / "trainer" / "state.json").read_text())
    name = f"the moving average of {world / 'student'} (update rate 0.2)"
    assert (
        state["teacher"] == name + ", privileged by '{answer} = {prompt}'"
        and state["teacher_moves"] is True
    )
    (folder / "trainer" / "state.json").write_text(json.dumps(state | {"teacher_moves": False}))
    write_manifest(folder)
    with pytest.raises(
        ValueError, match="cannot be resumed: it does not have the 21 weights of the moving average"
    ):
        rlad.train(config, resume=True)


# --- check ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "level"), [({"update_rate": 1.0}, "warning"), ({}, "ok")])
def test_a_student_that_teaches_itself_its_own_prompt_is_warned(world, tmp_path, teacher, level):
    config = parse_config(run_config(world, tmp_path) | {"teacher": {"type": "ema"} | teacher})
    setting = Setting(config, tiny_language_model().tokenizer, 64)
    (finding,) = check_teacher(config.teacher, setting)
    assert finding.level == level
    inside = parse_config(
        run_config(world, tmp_path)
        | {"teacher": {"type": "privileged", "teacher": {"type": "ema"} | teacher}}
    )
    (finding,) = check_teacher(
        EMATeacherConfig(type="ema", **teacher), replace(setting, config=inside)
    )
    assert finding.level == "ok"
