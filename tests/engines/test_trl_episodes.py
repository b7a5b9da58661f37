"""`RLADTrainer` with TRL's `environment_factory`: of an episode only what the student wrote has a
part in loss, gradient and denominators, and the teacher's word on the rest has none."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the optional package trl")

import torch
from datasets import Dataset
from torch import Tensor

from rlad.engines.trl.config import RLADConfig
from rlad.engines.trl.trainer import SCORED
from rlad.models.loading import LanguageModel
from rlad.objectives import token_loss
from rlad.objectives.inputs import LossInputs
from rlad.teachers.base import Answer, Teacher, TeacherRequest
from rlad.teachers.local import LocalTeacher
from tool_environments import Counter
from trl_episodes import END, ScriptedRLAD, add, call, tool_student
from trl_runs import ARGUMENTS, loss_and_gradient, move, nearby, steps_of, student_logprobs

pytestmark = pytest.mark.trl

LENGTH = 700
# Count to 2: right, right after an error, wrong, and wrong at once.
SCRIPTS = [
    [add(1), add(1), "Done."],
    [add(-1) + "\n" + call("look"), add(2), "It is 2."],
    [add(3), "Done."],
    ["I do not know."],
]
OBJECTIVES = {
    "trrd": "dapo",
    "grpo": "dapo",
    "kdrl": "grpo",
    "opd": "dr_grpo",
    "rlsd": "dapo",
    "distilled_rl": "grpo",
}


class Changed(Teacher):
    """A teacher that says something else of some tokens."""

    def __init__(self, teacher: Teacher, change: Callable[[Tensor, TeacherRequest], Tensor]):
        self.identity = "changed"
        self.teacher = teacher
        self.change = change
        self.asked: list[TeacherRequest] = []

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        self.asked += requests
        scored = zip(self.teacher.logprobs(requests), requests, strict=True)
        return [Answer.finished(self.change(values, request)) for values, request in scored]


def trainer_of(folder: Path, objective: str, change: Any = None, **arguments: Any) -> ScriptedRLAD:
    """Two optimiser steps on one batch of four episodes, so that old log-probs are recorded."""
    model, tokenizer = tool_student()
    settings: dict[str, Any] = ARGUMENTS | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "max_completion_length": LENGTH,
        "max_steps": 2,
    }
    teacher: Any = nearby(model)
    if change is not None:
        loaded = LanguageModel("near", teacher, tokenizer, (), 0, torch.float32)
        teacher = Changed(LocalTeacher(loaded, temperature=0.8, tokens_per_batch=8192), change)
    trainer = ScriptedRLAD(
        model,
        teacher=teacher,
        args=RLADConfig(str(folder), objective=objective, **(settings | arguments)),
        reward_funcs=[],
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": ""}], "number": 6}] * 8
        ),
        processing_class=tokenizer,
        environment_factory=Counter,
    )
    trainer.scripts = SCRIPTS
    return trainer


def parts_of(trainer: ScriptedRLAD) -> list[dict[str, Any]]:
    """The two micro-batches of the batch, in the order of the scripts."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows: Any = list(trainer.train_dataset)[:4]  # type: ignore[arg-type]
    whole = trainer._generate_and_score_completions(rows)
    return [
        {
            name: value[part] if isinstance(value, Tensor) and value.dim() else value
            for name, value in whole.items()
        }
        for part in (slice(0, 2), slice(2, 4))
    ]


def written(trainer: ScriptedRLAD, ids: Sequence[int], script: Sequence[str]) -> Tensor:
    """Which tokens the student wrote, found by its words alone."""
    tokenizer: Any = trainer.processing_class
    found = torch.zeros(len(ids), dtype=torch.bool)
    place = 0
    for turn in script:
        own = tokenizer(turn + END)["input_ids"]
        while list(ids[place : place + len(own)]) != own:
            place += 1
        found[place : place + len(own)] = True
        place += len(own)
    return found


def rows_of(trainer: ScriptedRLAD, parts: Sequence[dict[str, Any]]) -> list[Tensor]:
    rows = [row for part in parts for row in part["completion_ids"].tolist()]
    return [written(trainer, *pair) for pair in zip(rows, SCRIPTS, strict=True)]


def loss_without_the_environment(
    trainer: ScriptedRLAD, parts: Sequence[dict[str, Any]], own: Sequence[Tensor]
) -> float:
    """The loss of rows in which what the environment wrote had never been, in float64."""
    total = 0.0
    for i, tokens in enumerate(own):
        part = parts[i // 2]
        values = {"student_logprobs": student_logprobs(trainer, part)}
        values["old_logprobs"] = part["old_per_token_logps"]
        if "teacher_logprobs" in part:
            values["teacher_logprobs"] = part["teacher_logprobs"]
        columns = {name: one[i % 2][tokens][None].double() for name, one in values.items()}
        mask = torch.ones(1, int(tokens.sum()), dtype=torch.bool)
        advantages = part["advantages"][i % 2][None].double()
        objective = trainer.args.objective_config
        losses, _ = token_loss(
            objective.type,
            LossInputs(advantages=advantages, mask=mask, **columns),
            knobs=objective.knobs_at(0),
        )
        of_row = {"sequence_mean": losses.mean()}.get(trainer.args.aggregation, losses.sum())
        total += float(of_row)
    num_tokens = sum(int(tokens.sum()) for tokens in own)
    whole = {"sequence_mean": 4, "token_mean": num_tokens, "constant_length": 4 * LENGTH}
    # Each of two optimiser steps divides by half of the whole.
    return total / (whole[trainer.args.aggregation] / 2)


@pytest.mark.parametrize(("objective", "loss_type"), OBJECTIVES.items())
def test_the_loss_is_that_of_the_students_tokens_alone(tmp_path, objective, loss_type):
    trainer = trainer_of(tmp_path, objective, loss_type=loss_type)
    parts = parts_of(trainer)
    move(trainer, by=0.01)
    own = rows_of(trainer, parts)
    loss, gradient = loss_and_gradient(trainer, parts)
    expected = loss_without_the_environment(trainer, parts, own)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert gradient.norm() > 0

    # And no score of the environment's tokens reaches value or gradient.
    for part, first in zip(parts, (0, 2), strict=True):
        mask = torch.stack(own[first : first + 2])
        assert torch.equal(mask, (part["completion_mask"] * part["tool_mask"]).bool())
        for name in set(SCORED) & part.keys():
            part[name] = part[name].masked_fill(~mask, torch.nan)
    again = loss_and_gradient(trainer, parts)
    assert again[0] == loss
    assert torch.equal(again[1], gradient)


def test_the_teachers_word_on_the_environments_tokens_changes_nothing(tmp_path):
    trainer = trainer_of(tmp_path, "trrd", change=lambda values, _: values)
    teacher: Any = trainer.teacher

    def of(change: Any) -> tuple[float, Tensor, list[TeacherRequest]]:
        teacher.change = change
        teacher.asked = []
        return *loss_and_gradient(trainer, parts_of(trainer)), teacher.asked

    def own(values: Tensor, request: TeacherRequest) -> Tensor:
        assert request.actions is not None
        return torch.tensor(request.actions)

    plain = of(lambda values, _: values)
    shifted = of(lambda values, request: values - 0.3 * ~own(values, request))
    unknown = of(lambda values, request: values.masked_fill(~own(values, request), torch.nan))
    others = of(lambda values, request: values - 0.3 * own(values, request))
    for changed in (shifted, unknown):
        assert changed[0] == plain[0]
        assert torch.equal(changed[1], plain[1])
    assert not torch.equal(others[1], plain[1])
    # What nobody misses is not asked for again; and all that was written is read.
    assert len(unknown[2]) == len(plain[2]) == 4
    tokenizer: Any = trainer.processing_class
    assert "<tool_response>" in tokenizer.decode(unknown[2][0].completion)


def test_a_run_counts_the_students_tokens(tmp_path):
    trainer = trainer_of(tmp_path, "opd")
    steps = steps_of(trainer)
    tokenizer: Any = trainer.processing_class
    num_tokens = sum(len(tokenizer(turn + END)["input_ids"]) for row in SCRIPTS for turn in row)
    assert len(steps.gradients) == 2
    assert all(bool(one.isfinite().all()) and float(one.norm()) > 0 for one in steps.gradients)
    assert steps.logs[0]["teacher/tokens/count"] == num_tokens
    assert steps.logs[0]["rewards/Counter/mean"] == 0.5
