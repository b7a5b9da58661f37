"""`RLADTrainer` against the native engine on the same batch, and on two processes (gloo, CPU)
against one: DDP, and weights that torch's `fully_shard` splits.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

from parity_cases import EqualPrompts, by_engine, make_case, rollouts_of
from trl_parity import by_trl, in_processes, torchrun, trainer_of
from trl_runs import distance

# --- the native engine ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize(
    ("objective", "aggregation", "kl_coef"),
    [
        ("trrd", "sequence_mean", 0.0),
        ("trrd", "token_mean", 0.1),
        ("trrd", "constant_length", 0.0),
        ("grpo", "token_mean", 0.0),
        ("kdrl", "sequence_mean", 0.0),
        ("opd", "sequence_mean", 0.0),
        ("rlsd", "token_mean", 0.0),
        ("distilled_rl", "constant_length", 0.1),
    ],
)
def test_the_native_engine_has_the_same_loss_and_gradient(
    tmp_path, objective, aggregation, kl_coef
):
    """Same rollouts, some of which no verifier could judge, and models; everything else is
    TRL's."""
    optimization = {"aggregation": aggregation, "kl_coef": kl_coef}
    case = make_case(
        objective, optimization=optimization, rollout={"temperature": 0.7}, task=EqualPrompts()
    )
    batch = case.engine.make_rollout_batch(0)
    assert {"correct", "wrong", "cannot_judge"} <= {rollout.verdict for rollout in batch.rollouts}
    loss, gradients = by_engine(case, batch, rollouts_of(case))
    native = torch.cat(
        [gradients[name].flatten() for name, _ in case.engine.student.model.named_parameters()]
    )
    if kl_coef:
        case.reference.model.save_pretrained(tmp_path / "reference")
        case.engine.student.model.config.name_or_path = str(tmp_path / "reference")
    ours = by_trl(trainer_of(case.engine, batch, tmp_path))
    assert ours[0] == pytest.approx(loss, abs=1e-6)
    assert distance(ours[1], native) < 1e-6


# --- whole runs, by Accelerate --------------------------------------------------------------------

TRL_RUNS = Path(__file__).parents[1] / "trl_runs.py"
RUNS: dict[str, dict[str, Any]] = {
    "sequence_mean": {"objective": {"type": "trrd"}, "loss_type": "grpo"},
    "token_mean": {
        "objective": {"type": "kdrl", "kd_coef": 0.05},
        "loss_type": "dapo",
        "advantages": "rlad",
    },
    "constant_length": {
        "objective": {"type": "trrd"},
        "loss_type": "dr_grpo",
        "advantages": "rlad",
    },
}


@pytest.fixture(scope="module")
def one_and_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The runs above in one process and in two, with the same global batch: 16 rollouts in two
    micro-batches."""
    folders = {}
    for world, rows in ((1, 8), (2, 4)):
        folders[world] = tmp_path_factory.mktemp(f"world{world}")
        runs = {
            name: run | {"per_device_train_batch_size": rows, "max_steps": 3}
            for name, run in RUNS.items()
        }
        torchrun(world, TRL_RUNS, folders[world], runs)
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(one_and_two_processes, name):
    """DDP over gloo, float64: the gradients of 3 steps, losses and metrics."""
    one, two = (torch.load(folder / f"{name}.pt") for folder in one_and_two_processes.values())
    assert (one["world"], two["world"], len(one["gradients"])) == (1, 2, 3)
    for a, b in zip(two["gradients"], one["gradients"], strict=True):
        assert distance(a, b) < 1e-6 and b.norm() > 1e-3
    for a, b in zip(two["logs"], one["logs"], strict=True):
        own = [key for key in b if key.startswith(("objective/", "teacher/", "student/"))]
        assert len(own) > 6
        for key in ("loss", "grad_norm", "reward", *own):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key


# --- one step, by torch's `fully_shard`: on the CPU Accelerate would take DDP for FSDP2 without a w


AGGREGATIONS = ("sequence_mean", "token_mean")
SHARDED_TEACHER = {"teacher_is_sharded": True, "teacher_tokens_per_batch": 1}
STUDENTS = {
    aggregation: {"optimization": {"aggregation": aggregation}} for aggregation in AGGREGATIONS
}
TEACHERS = {
    wrapped: {"wrapped": wrapped, "arguments": SHARDED_TEACHER}
    for wrapped in ("ddp", "fully_shard")
}
Steps = dict[str, dict[str, Any]]


def test_a_process_that_dies_ends_all(tmp_path: Path) -> None:
    """The other one waits for it in a collective call; torchrun ends it."""
    with pytest.raises(RuntimeError, match=r"2 processes with .* failed"):
        torchrun(2, TRL_RUNS, tmp_path, {"run": {"second_process_dies": True}})
    assert not list(tmp_path.glob("*.pt"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """By aggregation, the trainer's step as one process makes it, nothing wrapped."""
    return dict(
        zip(
            STUDENTS,
            in_processes(1, tmp_path_factory.mktemp("one"), *STUDENTS.values()),
            strict=True,
        )
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """By aggregation, the student split over two processes; by what wraps the student, the teacher
    split over them."""
    cases = {name: case | {"wrapped": "fully_shard"} for name, case in STUDENTS.items()} | TEACHERS
    return dict(
        zip(cases, in_processes(2, tmp_path_factory.mktemp("two"), *cases.values()), strict=True)
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_student_split_over_two_processes_has_the_loss_and_gradient_of_one(
    one_process, two_processes, aggregation
):
    """Eight rollouts on each process, in micro-batches of two, some of no reward: nothing is
    divided by a rank's own counts."""
    one, two = one_process[aggregation], two_processes[aggregation]
    assert (one["world"], two["world"]) == (1, 2)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert distance(two["gradient"], one["gradient"]) < 1e-6 and one["gradient"].norm() > 1e-2


@pytest.mark.parametrize("wrapped", TEACHERS)
def test_a_teacher_split_over_two_processes_scores_as_a_whole_one(
    one_process, two_processes, wrapped
):
    """Micro-batches of one completion, of which the processes have unequal numbers: none waits for
    another one forever."""
    one, two = one_process["sequence_mean"], two_processes[wrapped]
    counts = [len(rows) for rows in two["teacher"]]
    assert counts[0] != counts[1] and min(counts) > 0
    ours, theirs = (
        sorted(row for rank in found["teacher"] for row in rank) for found in (two, one)
    )
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert distance(two["gradient"], one["gradient"]) < 1e-6
