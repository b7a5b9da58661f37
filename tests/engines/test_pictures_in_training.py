"""Runs whose problems have pictures: every objective, the gradient in any micro-batches, resume,
checkpoints that load again, adapters, and what is refused."""

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlad.checks.check import check_run
from rlad.config.file import parse_config
from rlad.engines.making import make_engine, require_pictures_fit
from rlad.engines.metrics import TokenStats
from rlad.errors import UserError
from rlad.models.loading import load_language_model, save_model
from rlad.models.pictures import PicturedPrompt
from rlad.models.student import load_student
from rlad.rollouts.grading import graded_groups
from rlad.rollouts.prompts import longest_prompt, prompt_token_ids
from rlad.rollouts.roles import role_spans
from rlad.rollouts.types import Completion
from rlad.tasks import Problem
from rlad.tasks.episodes import EpisodeRules
from tiny_vision import Looking, picture, tiny_seeing_model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, family, seed in (
        ("student", "llava", 0),
        ("teacher", "llava", 1),
        ("other", "idefics3", 0),
        ("qwen", "qwen2_vl", 0),
    ):
        save_model(tiny_seeing_model(family, seed=seed), folder / name)
    return folder


def config_of(models: Path, objective: Any = "grpo", **changes: Any) -> Any:
    table: dict[str, Any] = {
        "student": {"model": str(models / "student"), "device": "cpu"},
        "task": {"type": "scenes"},
        "objective": {"type": objective} if isinstance(objective, str) else objective,
        "rollout": {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 8},
        "optimization": {"num_steps": 4, "learning_rate": 1e-2, "tokens_per_batch": 200},
    }
    for key, value in changes.items():
        table[key] = table.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(table)


def engine_of(config: Any) -> Any:
    return make_engine(config, load_student(config), Looking(), before_work=lambda: None)


def teacher_of(models: Path) -> dict[str, Any]:
    return {"type": "local", "model": str(models / "teacher")}


PRIVILEGED = {"type": "privileged", "template": "{prompt} {answer}"}


@pytest.mark.parametrize(
    ("objective", "teacher"),
    [
        ("grpo", None),
        ("srpo", None),
        ("trrd", "local"),
        ({"type": "trrd", "evidence_weight": 0.5}, "local"),
        ("opd", "local"),
        ("sft", "local"),
        ("gkd", "local"),
        ("rlsd", "privileged"),
        ({"type": "sdpo", "top_k": 20}, "default"),
    ],
)
def test_objectives_train_on_pictures(models, objective, teacher):
    changes: dict[str, Any] = {}
    if teacher == "local":
        changes["teacher"] = teacher_of(models)
    elif teacher == "privileged":
        changes["teacher"] = PRIVILEGED | {"teacher": {"type": "ema", "update_rate": 1}}
    with closing(engine_of(config_of(models, objective, **changes))) as engine:
        batch = engine.make_rollout_batch(0)
        assert all(isinstance(prompt, PicturedPrompt) for prompt in batch.prompts)
        first = next(iter(engine.steps())).metrics
        assert math.isfinite(first["optimization/loss"])
        assert first["optimization/skipped/count"] == 0
        if objective in ("grpo", "srpo", "trrd", "opd", "gkd", "rlsd"):
            assert first["optimization/gradient_norm"] > 0
            assert first["sampler/mismatch/max"] < 1e-5


@pytest.mark.parametrize("objective", ["grpo", "srpo"])
def test_the_gradient_is_the_same_in_any_micro_batches(models, objective):
    gradients = []
    for size in (1, 10_000):
        config = config_of(models, objective, optimization={"tokens_per_batch": size})
        with closing(engine_of(config)) as engine:
            batch = engine.make_rollout_batch(0)
            rows = range(len(batch.rollouts))
            engine.accumulate_gradient(batch, rows, TokenStats())
            gradients.append([one.grad.clone() for one in engine.parameters])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_tower_stays_unless_it_is_to_be_trained(models):
    for train_vision in (False, True):
        config = config_of(models, student={"train_vision": train_vision})
        with closing(engine_of(config)) as engine:
            before = {n: p.clone() for n, p in engine.student.model.named_parameters()}
            next(iter(engine.steps()))
            moved = {
                name
                for name, parameter in engine.student.model.named_parameters()
                if not torch.equal(parameter, before[name])
            }
        assert any("language_model" in name for name in moved)
        assert any("vision_tower" in name for name in moved) == train_vision


@pytest.mark.parametrize("objective", ["grpo", "srpo"])
def test_a_run_resumes_exactly_on_a_batch_that_was_begun(models, objective, tmp_path):
    config = config_of(models, objective, optimization={"steps_per_rollout_batch": 2})
    with closing(engine_of(config)) as engine:
        steps = iter(engine.steps())
        next(steps)
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        engine.save(folder, run_digest="x")
        expected = [next(steps).metrics["optimization/loss"] for _ in range(3)]
    student = load_student(config, folder)
    with closing(make_engine(config, student, Looking(), before_work=lambda: None)) as engine:
        engine.restore(folder, run_digest="x")
        assert [one.metrics["optimization/loss"] for one in engine.steps()] == expected


@pytest.mark.parametrize("name", ["student", "other"])
def test_a_saved_model_sees_as_before(models, name, tmp_path):
    loaded = load_language_model(str(models / name), device="cpu")
    save_model(loaded, tmp_path)
    again = load_language_model(str(tmp_path), device="cpu")
    assert loaded.vision and again.vision
    pictures = [picture(3)]
    text = f"w12 {loaded.vision.wrapped_token} w13"
    first, second = (
        one.vision.prompt(text, pictures, add_special_tokens=True) for one in (loaded, again)
    )
    assert first == second
    ours, theirs = (one.vision.pixels(pictures) for one in (loaded, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_roles_are_found_in_a_completion_of_a_real_tokenizer(models):
    tokenizer: Any = load_language_model(str(models / "student"), device="cpu").tokenizer
    assert role_spans([12, 13], lambda ids: tokenizer.decode(ids)) is None


# --- what does not fit ----------------------------------------------------------------------------


def test_a_teacher_of_another_grid_is_refused(models):
    teacher = {"type": "local", "model": str(models / "other")}
    with pytest.raises(UserError, match="has 16 tokens for the student and 4 for the teacher"):
        engine_of(config_of(models, "opd", teacher=teacher))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"engine": {"type": "trl"}}, "engine.type = 'trl' trains on texts"),
        ({"objective": {"type": "opd"}, "teacher": {"model": "embedded/teacher"}},
         "reads only text"),
        (
            {"objective": {"type": "gkd", "support": "teacher_top_k", "top_k": 8},
             "teacher": {"type": "served", "urls": ["http://127.0.0.1:1/v1"], "model": "m"}},
            "type = 'served' gives log-probs of single tokens",
        ),
    ],
)  # fmt: skip
def test_what_takes_texts_alone_is_named(models, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        require_pictures_fit(config_of(models, **changes), Looking())


def test_what_takes_texts_alone_is_named_where_some_problems_are_texts(models):
    class Mixed(Looking):
        def problem(self, split: str, index: int, *, seed: int = 0) -> Problem:
            return super().problem(split, index) if index == 3 else Problem("w20", "w12", "text")

    with pytest.raises(UserError, match="trains on texts; use 'native'"):
        require_pictures_fit(config_of(models, engine={"type": "trl"}), Mixed())


def test_episodes_with_pictures_are_refused(models):
    student = tiny_seeing_model("llava")
    task = Looking()
    task.episode_rules = EpisodeRules(lambda: None)  # type: ignore[attr-defined, arg-type, return-value]
    rollout = config_of(models).rollout
    with pytest.raises(UserError, match="'looking' has episodes with pictures"):
        graded_groups(student, task, "train", [0], rollout=rollout, seed=0, problem_seed=0)


def test_verl_is_given_texts_and_models_of_texts_alone(models, tmp_path):
    from rlad.export.verl import _rows, export_verl
    from rlad.export.verl_command import Cluster

    with pytest.raises(UserError, match="the verl route trains on texts"):
        _rows(config_of(models), Looking(), "train", 1)
    with pytest.raises(UserError, match="reads pictures, and the verl route is for"):
        export_verl(config_of(models), tmp_path / "out", Cluster())


def test_what_a_teacher_writes_of_pictures_is_left_out(models):
    config = config_of(models, {"type": "sft", "rejection": False}, teacher=teacher_of(models))
    with closing(engine_of(config)) as engine:
        group = engine.make_rollout_batch(0).groups[0]
        token = engine.student.model.config.image_token_id
        completion = Completion((20, token, 1), (-1.0,) * 3, False)
        written = (replace(group.rollouts[0], completion=completion), *group.rollouts[1:])
        batch = engine.with_advantages(0, [replace(group, rollouts=written)])
        assert batch.counted.tolist() == [False, True, True, True]
        assert math.isfinite(engine.accumulate_gradient(batch, range(4), TokenStats()))


def test_a_template_of_the_reasoning_leaves_room_for_it(models):
    words = " w20" * 490
    config = config_of(models, {"type": "srpo", "reasoning_template": "{prompt}" + words})
    model = load_language_model(str(models / "student"), device="cpu")
    asked = config, Looking(), model.tokenizer, model.context_tokens
    with pytest.raises(UserError, match=r"train problem 0 in objective.reasoning_template has 50"):
        longest_prompt(*asked, vision=model.vision)
    # The bound of the student's own prompts is none of it.
    rollout = {"max_prompt_tokens": 40}
    config = config_of(
        models, {"type": "srpo", "reasoning_template": "{prompt}" + words[:400]}, rollout=rollout
    )
    assert longest_prompt(config, *asked[1:], vision=model.vision) < 40


def test_the_placeholder_of_a_film_is_refused_in_a_text(models):
    config = config_of(models, student={"model": str(models / "qwen")})
    model = load_language_model(config.student.model, device="cpu")
    for text in ("w20 <|video_pad|> w21", "w20 <|image_pad|>"):
        with pytest.raises(UserError, match=r"own text holds '<\|\w+_pad\|>', a placeholder of"):
            prompt_token_ids(model.tokenizer, text, config.rollout, [picture(0)], model.vision)


def test_a_student_of_texts_alone_is_named_by_check(models):
    config = config_of(models, student={"model": "embedded/student"})
    messages = [
        finding.message for finding in check_run(config).findings if finding.level == "error"
    ]
    assert any("the student reads only text" in message for message in messages)


def test_tower_and_adapter_do_not_go_together(models):
    with pytest.raises(UserError, match=r"leave one of them out"):
        config_of(models, student={"train_vision": True, "lora": {}})


@pytest.mark.peft
def test_an_adapter_is_for_the_language_part(models):
    pytest.importorskip("peft")
    config = config_of(models, student={"lora": {"rank": 2}})
    with closing(engine_of(config)) as engine:
        names = [n for n, p in engine.student.model.named_parameters() if p.requires_grad]
        assert names and all("language_model" in name for name in names)
        first = next(iter(engine.steps())).metrics
        assert first["optimization/gradient_norm"] > 0
        assert first["sampler/mismatch/max"] < 1e-5
