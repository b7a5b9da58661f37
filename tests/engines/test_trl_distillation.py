"""`sft` and `gkd` through the real TRL: losses and gradients against independent ones, whole runs, interruptions."""

import json
import math
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import rlad
import rlad.training.run
from rlad.config.file import parse_config
from rlad.config.run import RolloutConfig, RunConfig
from rlad.engines.base import StepResult
from rlad.engines.native.loop import NativeEngine
from rlad.engines.trl.distillation import TRLDistillationEngine, require_trl
from rlad.engines.trl.teacher_data import micro_batch_rows, write_teacher_data
from rlad.errors import RunFailedError
from rlad.models.loading import load_language_model
from rlad.rollouts.prompts import prompt_token_ids
from rlad.runs.checkpoints import MANIFEST
from rlad.runs.directory import RunDirectory
from rlad.stopping import Stop, StopRequested
from rlad.tasks import make_task
from tiny_models import tiny_model
from tiny_runs import WORDS, run_config, write_config, write_tokenizer, write_unreachable_answers, write_world

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

# Prompts of several lengths, several micro-batches in each step, a temperature that is not 1, a gradient that is clipped.
SECTIONS: dict[str, Any] = {
    "rollout": {"max_completion_tokens": 6, "temperature": 0.7},
    "optimization": {"tokens_per_batch": 40, "max_grad_norm": 0.05, "learning_rate": 1e-2},
}
WRITTEN_OR_SCORED = "teacher/tokens/count"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose prompts have 6, 8 or 10 tokens."""
    world = write_world(tmp_path_factory.mktemp("uneven"))
    sums = [[a, b, *[1] * more] for more in (1, 2, 3) for a in range(3) for b in range(3)]
    problems = [{"prompt": f"{' + '.join(map(str, terms))} =", "answer": str(sum(terms) % 3)} for terms in sums]
    (world / "path.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    for name, seed in (("gpt2-student", 3), ("gpt2-teacher", 4)):
        tiny_model("gpt2", seed=seed, vocab_size=len(WORDS), eos_token_id=1).save_pretrained(world / name)
        write_tokenizer(world / name)
    return world


def make_config(world: Path, run_dir: Path, method: str, **sections: Any) -> RunConfig:
    sections["objective"] = {"type": method} | sections.get("objective", {})
    merged = {name: SECTIONS.get(name, {}) | sections.get(name, {}) for name in {**SECTIONS, **sections}}
    return parse_config(run_config(world, run_dir, **merged))


def make_engine(config: RunConfig, **settings: Any) -> TRLDistillationEngine:
    assert config.teacher is not None
    student = load_language_model(config.student.model, trainable=True)
    task = make_task(**config.task.model_dump())
    return TRLDistillationEngine(
        config, student=student, teacher=load_language_model(config.teacher.model), task=task, **settings
    )


def steps_of(engine: TRLDistillationEngine, number: int | None = None) -> list[StepResult]:
    results: list[StepResult] = []

    def after_step(result: StepResult) -> bool:
        results.append(result)
        return len(results) != number

    engine.run(after_step)
    return results


def float64(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)


def gradient_norm(model: Any) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def log_softmax_of(model: Any, prompt: Any, completion: Any, temperature: float = 1.0) -> Tensor:
    """Of each completion token's distribution, `[token, vocabulary]`, from one unpadded sequence."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(dim=-1)


def without_times(result: StepResult) -> dict[str, float]:
    return {key: value for key, value in result.metrics.items() if not key.startswith(("time/", "memory/"))}


# --- sft --------------------------------------------------------------------------------------------------------------


def teacher_data(engine: TRLDistillationEngine) -> Any:
    parts = {"teacher": engine.teacher, "student": engine.student, "before_work": lambda: None}
    return write_teacher_data(engine.config, engine.task, **parts)


def test_first_sft_loss_and_gradient_are_those_of_the_mean_nll(uneven, tmp_path):
    engine = make_engine(make_config(uneven, tmp_path, "sft", objective={"rejection": False}))
    data, model = teacher_data(engine), float64(engine.config.student.model)
    (first,) = steps_of(engine, 1)
    nll, num_tokens = torch.tensor(0.0, dtype=torch.float64), 0
    for prompt, completion in (data.sequences[i] for i in data.steps[0]):
        logprobs = log_softmax_of(model, prompt, completion)
        nll = nll - logprobs.gather(1, torch.tensor(completion)[:, None]).sum()
        num_tokens += len(completion)
    (nll / num_tokens).backward()
    assert len({len(data.sequences[i][0]) for i in data.steps[0]}) > 1
    assert first.metrics["optimization/loss"] == pytest.approx(float(nll.detach()) / num_tokens, rel=1e-6)
    assert first.metrics["optimization/gradient_norm"] == pytest.approx(gradient_norm(model), rel=1e-5)
    assert first.metrics["rollout/completion_tokens/mean"] == num_tokens / len(data.steps[0])


def test_the_teacher_answers_the_prompts_of_the_rl_methods(uneven, tmp_path):
    engine = make_engine(make_config(uneven, tmp_path, "sft", objective={"rejection": False}))
    data, config = teacher_data(engine), engine.config
    problems = [engine.task.problem("train", i, seed=config.seed) for i in range(16)]
    prompts = [tuple(prompt_token_ids(engine.student.tokenizer, problem.prompt, RolloutConfig())) for problem in problems]
    assert [prompt for prompt, _ in data.sequences] == [prompt for prompt in prompts for _ in range(3)]
    assert [len(step) for step in data.steps] == [12] * 4
    assert sum(data.tokens_written) == sum(len(completion) for _, completion in data.sequences)
    assert any(completion[-1] == 1 for _, completion in data.sequences), "the end token is trained on"
    results = steps_of(engine)
    assert [result.metrics[WRITTEN_OR_SCORED] for result in results] == data.tokens_written
    assert [("sft/accepted/frac" in r.metrics, "time/teacher/seconds" in r.metrics) for r in results] == [(True, True)] + [
        (False, False)
    ] * 3


def test_rejection_keeps_correct_completions_and_goes_through_them_again(uneven, tmp_path):
    engine = make_engine(make_config(uneven, tmp_path, "sft"))
    data, decode = teacher_data(engine), engine.student.tokenizer.decode
    everything = teacher_data(make_engine(make_config(uneven, tmp_path, "sft", objective={"rejection": False})))
    problems = [engine.task.problem("train", i) for i in range(16) for _ in range(3)]
    correct = [
        sequence
        for sequence, problem in zip(everything.sequences, problems, strict=True)
        if engine.task.judge(problem, decode(sequence[1], skip_special_tokens=True)).verdict == "correct"
    ]
    assert 0 < len(correct) < len(everything.sequences) and data.sequences == correct
    assert data.accepted_share == len(correct) / len(everything.sequences)
    order = [i for step in data.steps for i in step]
    assert len(order) == 48 and {order.count(i) for i in range(len(correct))} <= {48 // len(correct), 48 // len(correct) + 1}
    (first, *_) = steps_of(engine)
    assert first.metrics["sft/accepted/frac"] == data.accepted_share


def test_steps_are_epochs_in_different_orders(uneven, tmp_path):
    """Two steps of all 12 sequences each: sorted by length, so only ties tell the orders apart; one step may split an epoch."""
    config = make_config(
        uneven, tmp_path, "sft", objective={"rejection": False}, optimization={"num_steps": 3, "max_teacher_tokens": 1}
    )
    data = teacher_data(make_engine(config))
    assert len(data.sequences) == 12 and len(data.tokens_written) == 1, "the budget ends the writing"
    assert [sorted(step) for step in data.steps] == [list(range(12))] * 3
    assert data.steps[0] != data.steps[1] and data.steps[1] != data.steps[2]
    lengths = [[sum(map(len, data.sequences[i])) for i in step] for step in data.steps]
    assert all(row == sorted(row, reverse=True) for row in lengths)


def test_nothing_left_after_rejection_is_one_sentence(world, tmp_path):
    config = make_config(world, tmp_path, "sft", task={"path": write_unreachable_answers(tmp_path)})
    with pytest.raises(RunFailedError, match="calls none of the teacher's 48 completions correct, so objective 'sft' has"):
        make_engine(config).run(lambda result: True)


@pytest.mark.parametrize(
    ("rows", "longest", "budget", "wanted"), [(12, 10, 40, 4), (12, 10, 59, 4), (12, 10, 9, 1), (7, 10, 60, 1)]
)
def test_micro_batches_stay_within_the_budget(rows, longest, budget, wanted):
    assert micro_batch_rows(rows, longest, budget) == wanted


# --- gkd --------------------------------------------------------------------------------------------------------------


def divergence(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Summed over tokens; log-probs `[token, vocabulary]`. GKD's definition: beta weighs the teacher's side."""
    if beta in (0.0, 1.0):
        above, below = (teacher, student) if beta == 0.0 else (student, teacher)
        return (above.exp() * (above - below)).sum()
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return (beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)).sum()


@pytest.mark.parametrize("family", ["", "gpt2-"])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_first_gkd_loss_and_gradient_are_those_of_the_divergence(uneven, tmp_path, beta, family):
    """Learned positions (gpt2) would show a prompt that is padded on the left."""
    models = {who: {"model": str(uneven / f"{family}{who}")} for who in ("student", "teacher")}
    engine = make_engine(make_config(uneven, tmp_path, "gkd", objective={"beta": beta}, **models))
    (first,) = steps_of(engine, 1)
    student, teacher = float64(models["student"]["model"]), float64(models["teacher"]["model"])
    loss, num_tokens = torch.tensor(0.0, dtype=torch.float64), 0
    for group in first.groups:
        for rollout in group.rollouts:
            pair = group.prompt_token_ids, rollout.completion.token_ids
            with torch.no_grad():
                wanted = log_softmax_of(teacher, *pair, temperature=0.7)
            loss = loss + divergence(wanted, log_softmax_of(student, *pair, temperature=0.7), beta)
            num_tokens += len(pair[1])
    (loss / num_tokens).backward()
    assert len({len(group.prompt_token_ids) for group in first.groups}) > 1
    assert first.metrics["optimization/loss"] == pytest.approx(float(loss.detach()) / num_tokens, rel=1e-5)
    assert first.metrics["optimization/gradient_norm"] == pytest.approx(gradient_norm(student), rel=1e-4)
    assert first.metrics[WRITTEN_OR_SCORED] == num_tokens


def test_gkd_trains_on_what_the_rl_methods_sample(uneven, tmp_path):
    engine = make_engine(make_config(uneven, tmp_path, "gkd"))
    native = NativeEngine(
        make_config(uneven, tmp_path, "grpo"), student=load_language_model(engine.student.name), task=engine.task
    )
    (first,) = steps_of(engine, 1)
    assert first.groups == native.make_rollout_batch(0).groups


def test_each_of_several_steps_on_a_rollout_batch_takes_its_share_of_the_prompts(uneven, tmp_path):
    config = make_config(uneven, tmp_path, "gkd", optimization={"steps_per_rollout_batch": 2})
    results = steps_of(make_engine(config))
    assert [[group.problem_index for group in result.groups] for result in results] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_another_teacher_gives_another_gradient(uneven, tmp_path):
    norms = []
    for alpha in (0.0, 1e-2):
        engine = make_engine(make_config(uneven, tmp_path, "gkd"))
        with torch.no_grad():
            for parameter in engine.teacher.model.parameters():
                parameter.mul_(1 + alpha)
        norms.append(steps_of(engine, 1)[0].metrics["optimization/gradient_norm"])
    assert abs(norms[1] / norms[0] - 1) > 1e-4


def test_different_vocabularies_are_refused(uneven, tmp_path):
    tiny_model(seed=5, vocab_size=len(WORDS) + 1, eos_token_id=1).save_pretrained(tmp_path / "padded")
    write_tokenizer(tmp_path / "padded")
    config = make_config(uneven, tmp_path, "gkd", teacher={"model": str(tmp_path / "padded")})
    with pytest.raises(ValueError, match="the student has 7 token probabilities and the teacher 8; pad both"):
        make_engine(config)


# --- both -------------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("objective", ["sft", "gkd"])


@BOTH
def test_two_runs_are_equal_bit_for_bit(uneven, tmp_path, objective):
    engines = [make_engine(make_config(uneven, tmp_path, objective)) for _ in range(2)]
    first, second = ([without_times(result) for result in steps_of(engine)] for engine in engines)
    assert first == second and len(first) == 4
    weights = [engine.student.model.state_dict() for engine in engines]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    initial = load_language_model(engines[0].student.name).model.state_dict()
    assert not all(torch.equal(weights[0][name], initial[name]) for name in initial)


@BOTH
def test_validation_in_the_middle_changes_nothing(uneven, tmp_path, objective):
    rows = []
    for every_steps in (1, 4):
        config = make_config(uneven, tmp_path / str(every_steps), objective, evaluation={"every_steps": every_steps})
        run = RunDirectory(rlad.train(config).run_dir)
        assert len([row for row in run.read("eval.jsonl") if row["split"] == "validation"]) == 1 + 4 // every_steps
        rows.append(
            [{k: v for k, v in row.items() if not k.startswith(("time", "memory"))} for row in run.read("metrics.jsonl")]
        )
    assert rows[0] == rows[1]


@BOTH
def test_schedule_and_optimiser_are_those_of_the_native_engine(uneven, tmp_path, objective):
    schedule = {"schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1}
    rates = []
    for name in (objective, "grpo"):
        run_dir = rlad.train(make_config(uneven, tmp_path / name, name, optimization=schedule)).run_dir
        rates.append([row["optimization/learning_rate"] for row in RunDirectory(run_dir).read("metrics.jsonl")])
    assert rates[0] == pytest.approx(rates[1], rel=1e-12) and rates[0][0] == 0


@BOTH
def test_the_student_is_left_as_a_plain_model(uneven, tmp_path, objective):
    """Checkpoints differ from those of the native engine in weights alone, and forward is its own again."""
    folders = {}
    for name in (objective, "grpo"):
        folders[name] = RunDirectory(rlad.train(make_config(uneven, tmp_path / name, name)).run_dir).checkpoints()[-1][1]
    files = sorted(path.name for path in folders["grpo"].iterdir())
    assert sorted(path.name for path in folders[objective].iterdir()) == files
    for name in (file for file in files if file.endswith(".json") and file != MANIFEST):  # which has a checksum of the weights
        assert (folders[objective] / name).read_text() == (folders["grpo"] / name).read_text(), name
    engine = make_engine(make_config(uneven, tmp_path, objective))
    steps_of(engine, 2)
    assert "forward" not in vars(engine.student.model) and not engine.student.model.training


@BOTH
def test_ends_when_told_and_may_stop_before_every_micro_batch(uneven, tmp_path, objective, monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("it pings home"))
    config = make_config(uneven, tmp_path, objective)
    engine = make_engine(config)
    assert [result.step for result in steps_of(engine, 3)] == [1, 2, 3] and engine.step == 3
    num_checks = 0

    def stop_in_the_second_step() -> None:
        nonlocal num_checks
        num_checks += 1
        if stopped.step == 1:
            raise StopRequested(signal.SIGINT)

    stopped = make_engine(config, before_work=stop_in_the_second_step)
    with pytest.raises(StopRequested):
        stopped.run(lambda result: True)
    again = make_engine(config)
    steps_of(again, 1)
    assert stopped.step == 1 and num_checks > 4
    pairs = zip(stopped.student.model.parameters(), again.student.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "no weight moved in the step that was not finished"


@BOTH
def test_weights_are_left_alone_when_the_gradient_is_not_finite(uneven, tmp_path, objective):
    engine = make_engine(make_config(uneven, tmp_path, objective, optimization={"max_grad_norm": 1.0}))
    before = {name: value.clone() for name, value in engine.student.model.state_dict().items()}
    next(engine.student.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RunFailedError, match=r"step 1: the gradient norm is nan, so the weights were left as they are"):
        engine.run(lambda result: True)
    assert all(torch.equal(value, before[name]) for name, value in engine.student.model.state_dict().items())


@BOTH
def test_bfloat16_and_checkpointing_train(uneven, tmp_path, objective):
    student = {"dtype": "bfloat16", "gradient_checkpointing": True, "device": "cpu"}
    config = make_config(uneven, tmp_path / "bf16", objective, student=student | {"model": str(uneven / "student")})
    losses = {}
    for each in (config, make_config(uneven, tmp_path / "float32", objective)):
        run = RunDirectory(rlad.train(each).run_dir)
        losses[run.path.name] = [row["optimization/loss"] for row in run.read("metrics.jsonl")]
        assert {p.dtype for p in load_language_model(str(run.checkpoints()[-1][1])).model.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["float32"] and losses["bf16"][0] == pytest.approx(losses["float32"][0], rel=0.5)


# --- runs -------------------------------------------------------------------------------------------------------------


@BOTH
def test_a_run_from_the_command_line(uneven, tmp_path, monkeypatch, objective):
    config = make_config(uneven, tmp_path / "run", "trrd").model_dump(mode="json", exclude_none=True)
    toml = write_config(tmp_path / "run.toml", config | {"objective": {"type": objective}})
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-m", "rlad", "train", str(toml)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "Warning" not in done.stdout and "'loss'" not in done.stdout and "test pass@1 after" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.toml"]
    run = RunDirectory(tmp_path / "run")
    assert [(r["split"], r["step"]) for r in run.read("eval.jsonl") if r["split"] == "test"] == [("test", 0), ("test", 4)]
    assert run.is_finished() and (run.path / "curve.png").is_file() and run.checkpoints()[-1][0] == 4
    assert [row["step"] for row in run.read("metrics.jsonl")] == [1, 2, 3, 4]


class StopInStep(rlad.training.reporter.Silent):
    """Asks to stop, as Ctrl-C would, when the step is done."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at = stop_at

    def step(self, result: StepResult, num_steps: int) -> None:
        if result.step == self.stop_at:
            raise StopRequested(signal.SIGINT)


@BOTH
def test_a_stopped_run_leaves_a_checkpoint_and_starts_again(uneven, tmp_path, objective):
    config = make_config(uneven, tmp_path / "run", objective, evaluation={"every_steps": 4})
    with pytest.raises(StopRequested):
        rlad.train(config, reporter=StopInStep(3))
    run = RunDirectory(config.directory)
    assert run.checkpoints()[-1][0] == 3
    with pytest.raises(ValueError, match=f"objective '{objective}' is trained by TRL, which cannot go on from step 3; start"):
        rlad.train(config, resume=True)
    assert rlad.train(config, overwrite=True).run_dir == run.path and run.is_finished()
    rlad.train(config, resume=True)  # at its last step there is nothing to do


@BOTH
def test_a_run_stopped_before_its_first_step_goes_on(uneven, tmp_path, objective, monkeypatch):
    config = make_config(uneven, tmp_path / "run", objective)
    checks = iter(range(10_000))

    def check(self: Stop) -> None:
        if next(checks) == 30:  # in the teacher's writing, or the first rollouts
            raise StopRequested(signal.SIGINT)

    monkeypatch.setattr(Stop, "check", check)
    with pytest.raises(StopRequested):
        rlad.train(config)
    assert [step for step, _ in RunDirectory(config.directory).checkpoints()] == [0]
    rlad.train(config, resume=True)
    whole = make_config(uneven, tmp_path / "whole", objective)
    rlad.train(whole)
    rows = []
    for each in (config, whole):
        found = RunDirectory(each.directory).read("metrics.jsonl")
        rows.append([{k: v for k, v in row.items() if not k.startswith(("time", "memory"))} for row in found])
    assert rows[0] == rows[1]


WITHOUT = "objective 'sft' is trained by TRL, and trl {}; install it with: pip install 'rlad[trl]'."
BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "trl":
            raise ImportError("No module named 'trl'")

sys.meta_path.insert(0, Blocker())
from rlad.cli.main import main
main(["train", sys.argv[1]])
"""


def test_without_trl_it_is_one_sentence(uneven, tmp_path):
    config = make_config(uneven, tmp_path / "run", "sft").model_dump(mode="json", exclude_none=True)
    command = [sys.executable, "-c", BLOCKED, str(write_config(tmp_path / "run.toml", config))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wanted = WITHOUT.format("cannot be imported (No module named 'trl')")
    assert (done.returncode, done.stderr) == (2, f"rlad: {wanted}\n") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("version", "found"), [(None, "is not installed"), ("1.17.0", "is version 1.17.0 instead of 1.16")])
def test_another_trl_or_none_is_one_sentence(monkeypatch, version, found):
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    with pytest.raises(ValueError, match=f"^{re.escape(WITHOUT.format(found))}$"):
        require_trl("sft")
