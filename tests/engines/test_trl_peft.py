"""A LoRA student in `RLADTrainer`: trained by the native engine's gradient, its base model as
teacher and reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.trl, pytest.mark.peft]
pytest.importorskip("trl", reason="needs the optional package trl")
peft = pytest.importorskip("peft", reason="needs the optional package peft")

from parity_cases import WordTask, make_case
from rlad.config.run import LoraConfig
from rlad.engines.metrics import TokenStats
from rlad.engines.native.loop import NativeEngine
from rlad.engines.trl.teacher import BaseModelTeacher
from rlad.models.adapters import add_lora, only_adapter
from rlad.scoring.scorer import Scorer
from rlad.teachers.adapter import AdapterTeacher
from tiny_models import tiny_language_model
from trl_parity import trainer_of
from trl_runs import distance, first_inputs, loss_and_gradient, make_trainer, steps_of, student

LORA: dict[str, Any] = {"rank": 3, "alpha": 6.0, "target_modules": ("q_proj", "v_proj")}
TEMPERATURE = 0.7


def peft_config(**settings: Any) -> Any:
    given = {
        "r": LORA["rank"],
        "lora_alpha": 6,
        "target_modules": list(LORA["target_modules"]),
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**given | settings)


def adapter_of(model: Any) -> dict[str, torch.nn.Parameter]:
    """By its name within the base model."""
    return {
        n.removeprefix("base_model.model."): p
        for n, p in model.named_parameters()
        if ".default." in n
    }


def randomise(model: Any) -> None:
    """Both factors away from zero, so that student and base model differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(adapter_of(model).items()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def native_engine() -> NativeEngine:
    """A LoRA student whose teacher is its base model."""
    config = make_case(rollout={"temperature": TEMPERATURE}).engine.config
    made = tiny_language_model("llama", eos_token_ids=tuple(range(1, 10)))
    add_lora(made.model, LoraConfig(**LORA), base="base", seed=1)
    randomise(made.model)
    teacher = AdapterTeacher(
        made, base="base", folder=None, temperature=TEMPERATURE, tokens_per_batch=60
    )
    return NativeEngine(config, student=made, task=WordTask(), teacher=teacher)


def with_adapter(folder: Path, engine: NativeEngine, batch: Any, **arguments: Any) -> Any:
    """The same student and teacher as TRL's user gives them: a plain model, twice, and
    `peft_config`."""
    base = tiny_language_model("llama").model
    trainer = {"peft_config": peft_config(), "teacher": base}
    made = trainer_of(engine, batch, folder, model=base, trainer=trainer, epsilon=0.2, **arguments)
    randomise(made.model)
    return made


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_the_adapters_gradient_is_that_of_the_native_engine(tmp_path):
    engine = native_engine()
    batch = engine.make_rollout_batch(1)
    loss = engine.accumulate_gradient(batch, list(range(len(batch.rollouts))), TokenStats())
    gradients = {
        name: p.grad.flatten().double()
        for name, p in adapter_of(engine.student.model).items()
        if p.grad is not None
    }
    trainer = with_adapter(tmp_path, engine, batch)
    native = torch.cat([gradients[name] for name in adapter_of(trainer.model)])
    assert [n for n, p in trainer.model.named_parameters() if p.requires_grad] == [
        n for n, _ in trainer.model.named_parameters() if ".default." in n
    ]
    ours = loss_and_gradient(trainer, first_inputs(trainer))
    assert ours[0] == pytest.approx(loss, abs=1e-5) and abs(loss) > 1e-3
    assert distance(ours[1], native) < 1e-5 and native.norm() > 1e-2


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_teacher_and_reference_are_the_base_model_without_adapter(tmp_path):
    """Against a plain model of its own; the student in memory needs no folder for the leash, and is
    left as it was."""
    engine = native_engine()
    batch = engine.make_rollout_batch(0)
    trainer = with_adapter(tmp_path, engine, batch, beta=0.1)
    assert isinstance(trainer.teacher, BaseModelTeacher)
    plain = Scorer(tiny_language_model("llama"), temperature=TEMPERATURE, tokens_per_batch=10_000)
    num_asked, largest = 0, 0.0
    for part in first_inputs(trainer):
        for i, row in enumerate(part["counted"]):
            if not row.any():  # no reward function judged it
                continue
            prompt = part["prompt_ids"][i][part["prompt_mask"][i].bool()].tolist()
            (expected,) = plain.score([prompt], [part["completion_ids"][i][row].tolist()])
            torch.testing.assert_close(
                part["ref_per_token_logps"][i][row], expected, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                part["teacher_logprobs"][i][row], expected, rtol=1e-4, atol=1e-5
            )
            num_asked += len(expected)
            with only_adapter(engine.student.model, "default"):
                (own,) = engine.scorer.score([prompt], [part["completion_ids"][i][row].tolist()])
            largest = max(largest, float((own - expected).abs().max()))
    assert num_asked > 20 and largest > 0.1, "student and base model differ"
    assert trainer.model.training and all(
        p.requires_grad for p in adapter_of(trainer.model).values()
    )


def test_a_run_trains_the_adapter_alone_and_saves_it(tmp_path):
    base = student()
    before = {name: p.clone() for name, p in base.named_parameters()}
    settings = {"peft_config": peft_config(lora_dropout=0.1), "teacher": base}
    trainer = make_trainer(
        tmp_path, "trrd", model=base, trainer=settings, save_strategy="steps", save_steps=4
    )
    initial = {name: p.detach().clone() for name, p in adapter_of(trainer.model).items()}
    steps = steps_of(trainer)
    assert len(steps.logs) == 4 and all(row["grad_norm"] > 0 for row in steps.logs)
    # The adapter starts without effect: student and teacher are one model in the first step, and
    # then no more.
    assert steps.logs[0]["teacher/log_ratio/mean"] == pytest.approx(0, abs=1e-5)
    assert abs(steps.logs[-1]["teacher/log_ratio/mean"]) > 1e-5
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert any(not torch.equal(p, initial[name]) for name, p in adapter_of(trainer.model).items())
    saved = tmp_path / "checkpoint-4"
    assert (saved / "adapter_model.safetensors").is_file() and not (
        saved / "model.safetensors"
    ).exists()
    dropout = [
        module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)
    ]
    assert 0.1 in dropout, "the teacher leaves the adapter's dropout alone"


def test_the_student_itself_is_no_teacher(tmp_path):
    model = student()
    with pytest.raises(
        ValueError,
        match=r"teacher is the student itself, which changes .* frozen copy, or peft_config to",
    ):
        make_trainer(tmp_path, "trrd", model=model, trainer={"teacher": model})
    settings = {"peft_config": peft_config(), "teacher": model}
    with pytest.raises(
        ValueError,
        match="teacher is the student's base model, whose weights teacher_is_sharded would shard",
    ):
        make_trainer(tmp_path, "trrd", model=model, trainer=settings, teacher_is_sharded=True)
