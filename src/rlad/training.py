"""From a config to a finished run directory."""

import hashlib
import json
import multiprocessing
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rlad.config import RunConfig
from rlad.config_file import dump_config, load_config, parse_config
from rlad.curve import draw_curve
from rlad.engines.native import NativeEngine, StepResult
from rlad.engines.native_state import restore_engine, save_engine
from rlad.environment import describe_environment
from rlad.evaluate import Estimate, evaluate, pass_at_1
from rlad.language_model import LanguageModel, context_tokens, load_language_model, load_model_config, load_tokenizer
from rlad.model_card import model_card
from rlad.objectives import OBJECTIVES
from rlad.prompts import check_prompt_length, prompt_token_ids
from rlad.run_dir import CONFIG, ENVIRONMENT, EVAL, METRICS, SAMPLES, CannotWriteError, RunDirectory
from rlad.stopping import Stop, StopRequested
from rlad.tasks import Split, Task, Verdict, make_task
from rlad.teachers import Teacher
from rlad.teachers.compatibility import compare_contexts, compare_tokenizers
from rlad.teachers.local import LocalTeacher

NUM_PROBED_PROBLEMS, NUM_PROBED_ANSWERS = 20, 5


class Reporter(Protocol):
    """Is told what happens in a run; the console's progress bar is one."""

    def phase(self, name: str) -> None: ...
    def step(self, result: StepResult, num_steps: int) -> None: ...
    def evaluated(self, split: Split, step: int, estimate: Estimate) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def phase(self, name: str) -> None:
        pass

    def step(self, result: StepResult, num_steps: int) -> None:
        pass

    def evaluated(self, split: Split, step: int, estimate: Estimate) -> None:
        pass


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run: pass@1 on the test split before and after, 95 % intervals over problems, and the time it took."""

    run_dir: Path
    before: Estimate
    after: Estimate
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"run_dir": str(self.run_dir)}


def train(
    config: RunConfig | dict[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a student as `config` says and write its run directory.

    `config` may be a nested dictionary as in a TOML file. Raises `ValueError` with one sentence for a user's mistake, and
    `StopRequested` after Ctrl-C or SIGTERM, when a checkpoint has been written. Nothing is written, and with `overwrite`
    nothing deleted, before models, task and prompts have been found good.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ValueError(
            "rlad.train is called where a worker process imports your script; put it under `if __name__ == '__main__':`."
        )
    config = config if isinstance(config, RunConfig) else parse_config(config)
    run = RunDirectory(config.directory)
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it; give one of the two.")
    stored = _stored_config(run, config) if resume else None
    if stored is None:
        run.require_free(overwrite=overwrite)
    checkpoint = run.checkpoints()[-1][1] if stored and run.checkpoints() else None
    with closing(make_task(**config.task.model_dump())) as task:
        training = Training(config, run, task, reporter or Silent(), checkpoint)
        if stored is None:
            run.create()
            run.write(ENVIRONMENT, json.dumps(describe_environment(config.seed), indent=2))
            run.write(CONFIG, dump_config(config))
        else:
            run.forget_after(training.engine.step if checkpoint else -1)
            if stored.optimization != config.optimization:  # more steps
                run.write(CONFIG, dump_config(config))
        return training.finish()


class Training:
    """One run in one process: the models, the engine and the run directory."""

    def __init__(self, config: RunConfig, run: RunDirectory, task: Task, reporter: Reporter, checkpoint: Path | None):
        self.config, self.run, self.task, self.reporter, self.stop = config, run, task, reporter, Stop()
        reporter.phase("loading models")
        require_working_verifier(task)
        self.student = _load_student(config, checkpoint)
        longest_prompt(config, task, self.student.tokenizer, self.student.context_tokens)
        self.engine = NativeEngine(
            config,
            student=self.student,
            task=task,
            teacher=make_teacher(config, self.student),
            reference=_load_reference(config) if config.optimization.kl_coef else None,
            before_work=self.stop.check,
        )
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: Path) -> None:
        try:
            restore_engine(self.engine, checkpoint, run_digest=run_digest(self.config))
        except ValueError as error:
            raise ValueError(_not_resumable(checkpoint, error)) from None
        step, num_steps = self.engine.step, self.config.optimization.num_steps
        if step > num_steps:
            raise ValueError(
                f"{self.run.path} has made {step} steps, but optimization.num_steps is {num_steps}; give it at least {step}."
            )
        if step > 0 and self._recorded("test", 0) is None:
            raise ValueError(f"{self.run.path}/{EVAL} has lost the test before training; put it back, or use --overwrite.")

    def finish(self) -> TrainResult:
        """Run to the end, or to a checkpoint and `StopRequested`."""
        signals = self.stop.on_signals() if current_thread() is main_thread() else nullcontext()
        started = time.monotonic()
        try:
            with signals:
                before = self._evaluate("test", 0) if self.engine.step == 0 else self._recorded("test", 0)
                self._steps()
                after = self._evaluate("test", self.engine.step)
        except CannotWriteError:
            raise
        except (StopRequested, ValueError):
            self.reporter.phase("writing a checkpoint")
            self.save()
            raise
        assert before is not None, "a run without it is not resumed"
        self.run.write("curve.png", draw_curve(self.run))
        self.run.write("README.md", model_card(self.config, self.run, before, after))
        return TrainResult(self.run.path, before, after, time.monotonic() - started)

    def _steps(self) -> None:
        every, num_steps = self.config.evaluation.every_steps, self.config.optimization.num_steps
        if self.engine.step % every == 0 or self.engine.step == num_steps:
            self._validate()
        self.reporter.phase("training")
        for result in self.engine.steps():
            self.run.append(METRICS, {"step": result.step, **result.metrics})
            self.run.append(SAMPLES, {"step": result.step, **result.groups[0].to_json()})
            self.reporter.step(result, num_steps)
            if result.step % every == 0 or result.step == num_steps:
                self._validate()
                self.reporter.phase("training")

    def _validate(self) -> None:
        """Validation, then a checkpoint; the best and the last checkpoint are kept."""
        self._evaluate("validation", self.engine.step)
        self.save()
        self.run.keep_only(self.engine.step, self.run.best_checkpoint()[0])

    def _evaluate(self, split: Split, step: int) -> Estimate:
        """pass@1 of the present student; a result that was recorded before an interruption is not computed again."""
        estimate = self._recorded(split, step)
        if estimate is None:
            settings = self.config.evaluation
            self.reporter.phase(f"evaluating on {split} problems")
            results = evaluate(
                self.student,
                self.task,
                split,
                rollout=self.config.rollout,
                num_problems=settings.num_test_problems if split == "test" else settings.num_validation_problems,
                num_samples=settings.num_samples,
                temperature=settings.temperature,
                before_token=self.stop.check,
            )
            estimate = pass_at_1(results)
            rows = [asdict(result) for result in results]
            self.run.append(EVAL, {"step": step, "split": split, "pass@1": asdict(estimate), "results": rows})
        self.reporter.evaluated(split, step, estimate)
        return estimate

    def _recorded(self, split: Split, step: int) -> Estimate | None:
        for row in self.run.read(EVAL):
            if row["split"] == split and row["step"] == step:
                return Estimate(**row["pass@1"])
        return None

    def save(self) -> None:
        """A checkpoint of the present step, unless there is one."""
        step = self.engine.step
        if not self.run.checkpoint(step).is_dir():
            self.run.write_checkpoint(step, lambda folder: save_engine(self.engine, folder, run_digest=run_digest(self.config)))


def require_working_verifier(task: Task) -> None:
    """`ValueError` when the verifier cannot judge even the reference answers of the first problems."""
    problems = [task.problem("train", i) for i in range(NUM_PROBED_ANSWERS)]
    judgements = [task.judge(problem, problem.answer) for problem in problems]
    if all(judgement.verdict == Verdict.CANNOT_JUDGE for judgement in judgements):
        raise ValueError(
            f"the verifier of task {task.name!r} cannot judge the reference answers of the first {len(problems)} training "
            f"problems ({judgements[0].reason}); mend the verifier or the answers."
        )


def longest_prompt(config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, context_tokens: int | None) -> int:
    """Tokens of the longest prompt: of all that a finite task will give, of the first few of an endless one.

    Raises `ValueError` when one leaves no room for its completion.
    """
    loop, rollout, evaluation = config.optimization, config.rollout, config.evaluation
    num_batches = -(-loop.num_steps // loop.steps_per_rollout_batch)
    wanted: dict[Split, int] = {
        "train": num_batches * rollout.prompts_per_batch,
        "validation": evaluation.num_validation_problems,
        "test": evaluation.num_test_problems,
    }
    longest = 0
    for split, number in wanted.items():
        for i in range(min(number, task.num_problems(split) or NUM_PROBED_PROBLEMS)):
            problem = task.problem(split, i, seed=config.seed if split == "train" else 0)
            prompt = prompt_token_ids(tokenizer, problem.prompt, rollout.prompt_format)
            check_prompt_length(len(prompt), f"{split} problem {i}", rollout, context_tokens)
            longest = max(longest, len(prompt))
    return longest


def make_teacher(config: RunConfig, student: LanguageModel) -> Teacher | None:
    """The teacher that the objective needs, or None. `ValueError` when it cannot score this student's tokens."""
    if not OBJECTIVES[config.objective.type].needs_teacher:
        return None
    settings = config.teacher
    assert settings is not None, "RunConfig refuses such an objective without a teacher"
    context = context_tokens(load_model_config(settings.model))
    findings = compare_tokenizers(student.tokenizer, load_tokenizer(settings.model))
    for finding in (*findings, compare_contexts(config.rollout, student.context_tokens, context)):
        if finding.level == "error":
            raise ValueError(f"teacher {settings.model!r} cannot score the student's tokens: {finding.message}")
    device = str(student.model.device) if settings.device == "auto" else settings.device
    return LocalTeacher(
        load_language_model(settings.model, dtype=settings.dtype, device=device),
        temperature=config.rollout.temperature,
        tokens_per_batch=settings.tokens_per_batch,
    )


def run_digest(config: RunConfig) -> str:
    """Equal for configs that describe the same run, wherever it lies and, unless its schedule depends on it, however many
    steps it is to have.
    """
    table = config.model_dump(mode="json", exclude={"run_dir"})
    if config.optimization.schedule == "constant":
        del table["optimization"]["num_steps"]
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _stored_config(run: RunDirectory, config: RunConfig) -> RunConfig:
    """The config of the run that is to be resumed. `ValueError` when there is none, or when it is another run."""
    if not run.exists():
        raise ValueError(f"there is no run in {run.path} to go on with; start it without --resume, or give its run_dir.")
    stored = load_config(run.path)
    if run_digest(stored) != run_digest(config):
        raise ValueError(
            f"{run.path} holds a run with another config; go on with it by `rlad train {run.path} --resume`, "
            "or choose another run_dir for this one."
        )
    return stored


def _load_student(config: RunConfig, checkpoint: Path | None) -> LanguageModel:
    settings = config.student
    try:
        return load_language_model(
            str(checkpoint or settings.model), dtype=settings.dtype, device=settings.device, trainable=True
        )
    except ValueError as error:
        raise ValueError(_not_resumable(checkpoint, error)) if checkpoint else error from None


def _not_resumable(checkpoint: Path, error: ValueError) -> str:
    return f"checkpoint {checkpoint} cannot be resumed: {error} Delete that folder to go on from the one before it, if any."


def _load_reference(config: RunConfig) -> LanguageModel:
    return load_language_model(config.student.model, dtype=config.student.dtype, device=config.student.device, trainable=True)
