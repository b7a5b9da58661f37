"""`sft` and `gkd` on the native engine: the loss of a batch, who writes it, and whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

import rlad
import rlad.training.run
from parity_cases import Case, by_engine, by_reference, difference, make_case, nearby, rollouts_of
from rlad.config.run import RunConfig
from rlad.engines.metrics import TokenStats, ranking_metrics
from rlad.errors import RunFailedError, UserError
from rlad.rollouts.sampling import OwnSampler, sample
from rlad.runs.directory import METRICS, RunDirectory
from rlad.seeds import stream_seed
from rlad.stopping import StopRequested
from rlad.teachers.local import LocalTeacher
from tiny_models import VOCABULARY, tiny_language_model
from tiny_runs import StopAt, remains, run_config

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("sft", {"rejection": False}),
    *(("gkd", {"beta": beta}) for beta in (0.0, 0.2, 0.5, 1.0)),
    *(
        ("gkd", {"beta": beta, "support": support, "top_k": 5})
        for beta in (0.0, 0.5, 1.0)
        for support in ("student_top_k", "teacher_top_k", "sampled")
    ),
]
RANKING = ("teacher/ranking/pairwise", "teacher/ranking/auc")
BOTH = pytest.mark.parametrize("objective", ["sft", "gkd"])


def agree(ours: tuple[float, Any], theirs: tuple[float, Any]) -> bool:
    loss, gradient = difference(ours, theirs)
    print(f"loss {loss:.1e} gradient {gradient:.1e}")
    return loss < 1e-12 and gradient < 1e-12


# --- one batch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "kl_coef"),
    [("sequence_mean", 0.0), ("token_mean", 0.3), ("constant_length", 0.0)],
)
@pytest.mark.parametrize(("objective", "knobs"), VARIANTS)
def test_engine_equals_the_slow_reference(
    objective: str, knobs: dict[str, Any], aggregation: str, kl_coef: float
) -> None:
    """In micro-batches, at a temperature of its own, from float64 logits of all tokens."""
    case = make_case(
        objective,
        knobs=knobs,
        rollout={"temperature": 0.7},
        optimization={"aggregation": aggregation, "kl_coef": kl_coef},
    )
    batch = case.engine.make_rollout_batch(0)
    wanted = rollouts_of(case)
    stats = TokenStats()
    assert len(case.engine.scorer.batches(batch.prompts, batch.completions)) > 2
    ours = by_engine(case, batch, wanted, stats)
    assert agree(ours, by_reference(case, batch, wanted)) and abs(ours[0]) > 0.002
    summary = stats.summary()
    assert ("teacher/divergence/mean" in summary) == (objective == "gkd")
    assert ("sampler/mismatch/mean" in summary) == (objective == "gkd")


@BOTH
def test_each_of_two_steps_takes_its_share_of_the_batch(objective: str) -> None:
    case = make_case(objective, optimization={"steps_per_rollout_batch": 2})
    batch = case.engine.make_rollout_batch(0)
    for part in (0, 1):
        prompts = case.engine.minibatch(0, part)
        wanted = rollouts_of(case, prompts)
        assert agree(by_engine(case, batch, wanted), by_reference(case, batch, wanted))
        case.engine.update(batch, prompts)


@pytest.mark.parametrize("support", ["full", "student_top_k", "teacher_top_k"])
def test_the_teachers_ranking_of_what_a_step_compares(support: str) -> None:
    """Of the step's own prompts, from the log-probs that the teacher gives when asked for them."""
    knobs = {} if support == "full" else {"support": support, "top_k": 5}
    case = make_case("gkd", knobs=knobs, optimization={"steps_per_rollout_batch": 2})
    batch = case.engine.make_rollout_batch(0)
    assert case.engine.teacher is not None
    logprobs = case.engine.teacher.logprobs(batch.teacher_requests(range(16)))
    num_ranked = 0
    for part in (0, 1):
        prompts = case.engine.minibatch(0, part)
        expected = ranking_metrics(
            [batch.groups[i] for i in prompts], [logprobs[i] for i in rollouts_of(case, prompts)]
        )
        metrics = case.engine.update(batch, prompts)
        assert {name: metrics.get(name) for name in RANKING} == {
            name: expected.get(name) for name in RANKING
        }
        num_ranked += len(expected)
    assert num_ranked >= 2


def test_gkd_with_the_student_as_teacher_changes_nothing() -> None:
    case = make_case("gkd")
    case.engine.teacher = LocalTeacher(
        nearby(case.engine.student, seed=1, distance=0.0), temperature=1.0, tokens_per_batch=60
    )
    batch = case.engine.make_rollout_batch(0)
    loss, gradients = by_engine(case, batch, rollouts_of(case))
    assert abs(loss) < 1e-15
    assert all(float(gradient.abs().max()) < 1e-14 for gradient in gradients.values())


def test_gkd_trains_on_what_the_student_samples_and_sft_on_what_the_teacher_writes() -> None:
    """Prompted as the student is, with the sampler's own draws."""
    cases = {name: make_case(name) for name in ("grpo", "gkd", "sft")}
    batches = {name: case.engine.make_rollout_batch(0) for name, case in cases.items()}
    assert batches["gkd"].completions == batches["grpo"].completions
    assert batches["sft"].prompts == batches["grpo"].prompts
    engine = cases["sft"].engine
    written = sample(
        cases["sft"].teacher,
        [list(group.prompt_token_ids) for group in batches["sft"].groups],
        group_size=4,
        max_completion_tokens=12,
        temperature=1.0,
        seed=stream_seed(engine.config.seed, "teacher rollouts", 0),
    )
    completions = [completion.token_ids for group in written for completion in group]
    assert batches["sft"].completions == completions != batches["gkd"].completions
    for name in ("gkd", "sft"):
        num_tokens = sum(map(len, batches[name].completions))
        assert batches[name].counts == {"teacher/tokens/count": num_tokens}


def test_rejection_keeps_what_is_correct() -> None:
    kept, everything = (
        make_case("sft", knobs={"rejection": rejection}).engine.make_rollout_batch(0)
        for rejection in (True, False)
    )
    assert torch.equal(kept.trains, kept.is_correct) and 0 < int(kept.trains.sum()) < 16
    assert bool(everything.trains.all())


def test_what_the_student_cannot_read_is_left_out() -> None:
    """The teacher's vocabulary is padded further than the student's."""
    case = make_case("sft", knobs={"rejection": False})
    teacher = tiny_language_model("gpt2", vocab_size=VOCABULARY + 4, dtype=torch.float64)
    case.engine.teacher = LocalTeacher(teacher, temperature=1.0, tokens_per_batch=60)
    case.engine.writer = OwnSampler(teacher, case.engine.config.rollout)
    batch = case.engine.make_rollout_batch(0)
    readable = [max(ids) < VOCABULARY for ids in batch.completions]
    assert batch.trains.tolist() == readable and 0 < sum(readable) < 16
    case.engine.update(batch, range(4))


# --- refusals -----------------------------------------------------------------------------------


def with_teacher(teacher: Any) -> Case:
    case = make_case("gkd")
    engine = case.engine
    local = LocalTeacher(teacher, temperature=1.0, tokens_per_batch=60)
    type(engine)(engine.config, student=engine.student, task=engine.task, teacher=local)
    return case


def test_distributions_over_different_vocabularies_are_refused() -> None:
    with pytest.raises(
        UserError, match="the student has 64 token probabilities and the teacher 65"
    ):
        with_teacher(tiny_language_model(vocab_size=VOCABULARY + 1))


SERVED = {"type": "served", "urls": ["http://127.0.0.1:1/v1"], "model": "x"}


@pytest.mark.parametrize(
    ("objective", "teacher", "problem"),
    [
        ({"type": "sft"}, {"type": "ema"}, "needs the teacher's model itself"),
        ({"type": "sft"}, SERVED, "needs the teacher's model itself"),
        ({"type": "gkd"}, SERVED, "the support 'full', but this teacher of type 'served' gives"),
        (
            {"type": "kdrl", "kd_estimator": "exact"},
            {"type": "cached", "teacher": {"model": "x"}},
            "type 'cached' gives only 'sampled' and 'student_top_k' and 'teacher_top_k'",
        ),
        (
            {"type": "gkd", "support": "student_top_k"},
            {
                "type": "several",
                "combine": "mixture",
                "teachers": {"a": SERVED, "b": {"model": "x"}},
            },
            "of type 'several' gives only 'sampled'",
        ),
    ],
)
def test_what_a_teacher_cannot_give_is_refused(
    world: Path, tmp_path: Path, objective: Any, teacher: dict[str, Any], problem: str
) -> None:
    said = run_config(world, tmp_path, objective=objective) | {"teacher": teacher}
    with pytest.raises(ValueError, match=problem):
        RunConfig.model_validate(said)


def test_more_tokens_than_there_are_cannot_be_told_apart() -> None:
    with pytest.raises(UserError, match=r"top_k is 65, but the student's vocabulary has"):
        make_case("gkd", knobs={"support": "teacher_top_k", "top_k": VOCABULARY + 1})


def test_a_teacher_without_numbers_stops_the_run() -> None:
    case = make_case("gkd")
    with torch.no_grad():
        case.teacher.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(RunFailedError, match=r"the teacher gave no finite log-prob for 100\.0%"):
        case.engine.update(case.engine.make_rollout_batch(0), range(4))


# --- whole runs ---------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {
    "rollout": {"prompts_per_batch": 4, "group_size": 3, "max_completion_tokens": 4},
    "optimization": {
        "num_steps": 4,
        "steps_per_rollout_batch": 2,
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "kl_coef": 0.05,
        "tokens_per_batch": 24,
    },
    "evaluation": {"every_steps": 2, "num_validation_problems": 2, "num_test_problems": 2},
}


@BOTH
def test_an_interrupted_run_resumes_bit_for_bit(
    world: Path, tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while completions are written, and between two steps on one rollout batch."""
    section = {"type": objective} | ({"rejection": False} if objective == "sft" else {})
    whole = run_config(world, tmp_path / "whole" / "run", objective=section, **SECTIONS)
    rlad.train(whole)
    wanted = remains(tmp_path / "whole" / "run")
    rows = list(RunDirectory(tmp_path / "whole" / "run").read(METRICS))
    assert sum(row.get("teacher/tokens/count", 0) for row in rows) > 0
    monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(10**9))
    rlad.train(run_config(world, tmp_path / "counted" / "run", objective=section, **SECTIONS))
    num_checks = StopAt.num_checks
    for at in range(1, num_checks, max(1, num_checks // 7)):
        config = run_config(world, tmp_path / str(at) / "run", objective=section, **SECTIONS)
        monkeypatch.setattr(rlad.training.run, "Stop", lambda at=at: StopAt(at))
        with pytest.raises(StopRequested):
            rlad.train(config)
        monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(10**9))
        rlad.train(config, resume=True)
        assert remains(Path(config["run_dir"])) == wanted, at


@BOTH
def test_an_adapter_learns_too(world: Path, tmp_path: Path, objective: str) -> None:
    pytest.importorskip("peft")
    section = {"type": objective} | ({"rejection": False} if objective == "sft" else {})
    config = run_config(world, tmp_path / "run", objective=section, **SECTIONS)
    config["student"]["lora"] = {"rank": 2}
    rows = list(RunDirectory(rlad.train(config).run_dir).read(METRICS))
    assert all(row["optimization/gradient_norm"] > 0 for row in rows)
