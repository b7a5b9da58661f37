"""From a config to a finished run directory."""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Protocol

from rlad.config import TRAINED_BY_TRL, RunConfig
from rlad.config_file import dump_config, load_config, parse_config
from rlad.curve import draw_curve
from rlad.engines.engine import Engine, StepResult
from rlad.engines.native import NativeEngine
from rlad.environment import describe_environment
from rlad.evaluate import evaluate
from rlad.language_model import LanguageModel
from rlad.model_card import model_card
from rlad.preparation import (
    load_reference,
    load_student,
    load_teacher,
    longest_prompt,
    prepare_teacher,
    require_working_verifier,
)
from rlad.problem_results import pass_at_1
from rlad.run_dir import CONFIG, ENVIRONMENT, EVAL, METRICS, MODEL_CARD, SAMPLES, CannotWriteError, EvaluationSet, RunDirectory
from rlad.statistics import Estimate
from rlad.stopping import Stop, StopRequested
from rlad.tasks import Task, make_task


class Reporter(Protocol):
    """Is told what happens in a run; the console's progress bar is one."""

    def phase(self, name: str) -> None: ...
    def step(self, result: StepResult, num_steps: int) -> None: ...
    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def phase(self, name: str) -> None:
        pass

    def step(self, result: StepResult, num_steps: int) -> None:
        pass

    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None:
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
    with ExitStack() as held:
        if run.exists():
            held.enter_context(run.locked())
        task = held.enter_context(closing(make_task(**config.task.model_dump())))
        ood = config.ood_task
        ood_task = held.enter_context(closing(make_task(**ood.model_dump()))) if ood else None
        training = Training(config, run, task, ood_task, reporter or Silent(), checkpoint)
        held.enter_context(closing(training.engine))
        if stored is None:
            run.create()
            held.enter_context(run.locked())
            run.write(ENVIRONMENT, json.dumps(describe_environment(config.seed), indent=2))
            run.write(CONFIG, dump_config(config))
        else:
            run.delete(MODEL_CARD)  # a run without it is not finished
            run.forget_after(training.engine.step if checkpoint else -1)
            if stored != config:  # more steps, or a teacher that is reached in another way
                run.write(CONFIG, dump_config(config))
        return training.finish()


class Training:
    """One run in one process: the models, the engine and the run directory."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        task: Task,
        ood_task: Task | None,
        reporter: Reporter,
        checkpoint: Path | None,
    ):
        self.config, self.run, self.task, self.ood_task = config, run, task, ood_task
        self.reporter, self.stop = reporter, Stop()
        reporter.phase("loading models")
        require_working_verifier(task)
        self.student = _load_student(config, checkpoint)
        longest_prompt(config, task, self.student.tokenizer, self.student.context_tokens, ood_task)
        self.engine = make_engine(config, self.student, task, before_work=self.stop.check)
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: Path) -> None:
        try:
            self.engine.restore(checkpoint, run_digest=self.config.digest)
        except ValueError as error:
            by_trl = self.config.objective.type in TRAINED_BY_TRL
            raise ValueError(str(error) if by_trl else _not_resumable(checkpoint, error)) from None
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
                before = self._test(0) if self.engine.step == 0 else self._recorded("test", 0)
                self._train()
                after = self._test(self.engine.step)
        except CannotWriteError:
            raise
        except (StopRequested, ValueError):
            self.reporter.phase("writing a checkpoint")
            self.save()
            raise
        assert before is not None, "a run without it is not resumed"
        self.run.write("curve.png", draw_curve(self.run))
        self.run.write(MODEL_CARD, model_card(self.config, self.run, before, after))
        return TrainResult(self.run.path, before, after, time.monotonic() - started)

    def _train(self) -> None:
        """Steps to the end, each recorded; validation and a checkpoint at its times and behind the last step."""
        settings, num_steps = self.config.evaluation, self.config.optimization.num_steps
        spent: list[float] = [sum(column) for column in zip(*map(_spent, self.run.read(METRICS)), strict=True)] or [0.0, 0.0]

        def is_over() -> bool:
            limits = (self.config.optimization.max_seconds, self.config.optimization.max_teacher_tokens)
            return any(limit is not None and used >= limit for used, limit in zip(spent, limits, strict=True))

        def after_step(result: StepResult) -> bool:
            self.run.append(METRICS, {"step": result.step, **result.metrics})
            if result.groups:
                self.run.append(SAMPLES, {"step": result.step} | self._sample_row(result))
            self.reporter.step(result, num_steps)
            spent[:] = [used + new for used, new in zip(spent, _spent(result.metrics), strict=True)]
            if result.step % settings.every_steps == 0 or result.step == num_steps or is_over():
                self._validate()
                self.reporter.phase("training")
            return not is_over()

        if self.engine.step % settings.every_steps == 0 or self.engine.step == num_steps or is_over():
            self._validate()
        if not is_over():
            self.reporter.phase("training")
            self.engine.run(after_step)

    def _sample_row(self, result: StepResult) -> dict[str, Any]:
        """The first group of a step with the text of each token, and what the update did with them."""
        row, decode = result.groups[0].to_json(), self.student.tokenizer.decode
        for i, rollout in enumerate(row["rollouts"]):
            rollout["tokens"] = [decode([token]) for token in rollout["completion"]["token_ids"]]
            rollout["imitation"] = (result.imitation or {}).get(i)
        return row

    def _validate(self) -> None:
        """Validation, then a checkpoint; the best and the last checkpoint are kept."""
        self._evaluate("validation", self.engine.step)
        self.save()
        self.run.keep_only(self.engine.step, self.run.best_checkpoint()[0])

    def _test(self, step: int) -> Estimate:
        """pass@1 on the test split; the out-of-distribution test, where there is one, is recorded too."""
        if self.ood_task is not None:
            self._evaluate("ood", step)
        return self._evaluate("test", step)

    def _evaluate(self, name: EvaluationSet, step: int) -> Estimate:
        """pass@1 of the present student; a result that was recorded before an interruption is not computed again."""
        estimate = self._recorded(name, step)
        if estimate is None:
            settings = self.config.evaluation
            num_problems, num_samples = {
                "validation": (settings.num_validation_problems, settings.num_validation_samples),
                "test": (settings.num_test_problems, settings.num_test_samples),
                "ood": (settings.num_ood_problems, settings.num_test_samples),
            }[name]
            self.reporter.phase(f"evaluating on {name} problems")
            results = evaluate(
                self.student,
                self.ood_task if name == "ood" and self.ood_task else self.task,
                "validation" if name == "validation" else "test",
                rollout=self.config.rollout,
                num_problems=num_problems,
                num_samples=num_samples,
                temperature=settings.temperature,
                before_token=self.stop.check,
            )
            estimate = pass_at_1(results)
            rows = [asdict(result) for result in results]
            self.run.append(EVAL, {"step": step, "split": name, "pass@1": asdict(estimate), "results": rows})
        self.reporter.evaluated(name, step, estimate)
        return estimate

    def _recorded(self, name: EvaluationSet, step: int) -> Estimate | None:
        for row in self.run.read(EVAL):
            if row["split"] == name and row["step"] == step:
                return Estimate(**row["pass@1"])
        return None

    def save(self) -> None:
        """A checkpoint of the present step, unless there is one."""
        step = self.engine.step
        if not self.run.checkpoint(step).is_dir():
            self.run.write_checkpoint(step, lambda folder: self.engine.save(folder, run_digest=self.config.digest))


def _spent(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Seconds and teacher tokens of one step."""
    return sum(v for k, v in metrics.items() if k.startswith("time/")), metrics.get("teacher/tokens/count", 0.0)


def make_engine(config: RunConfig, student: LanguageModel, task: Task, *, before_work: Callable[[], None]) -> Engine:
    """The engine of a run: the one that its config names, but TRL's own for what TRL alone trains."""
    if config.objective.type in TRAINED_BY_TRL:
        from rlad.engines.trl_distillation import TRLDistillationEngine

        return TRLDistillationEngine(
            config, student=student, teacher=load_teacher(config, student), task=task, before_work=before_work
        )
    if config.engine.type == "trl":
        from rlad.engines.trl_distillation import require_trl

        require_trl(config.objective.type)
        from rlad.engines.trl_engine import TRLEngine

        teacher = prepare_teacher(config, student, before_work)
        return TRLEngine(config, student=student, task=task, teacher=teacher, before_work=before_work)
    return NativeEngine(
        config,
        student=student,
        task=task,
        reference=load_reference(config, student) if config.optimization.kl_coef else None,
        teacher=prepare_teacher(config, student, before_work),
        before_work=before_work,
    )


def how_to_go_on(config: RunConfig) -> str:
    """What to type when a run was stopped and its checkpoint is written."""
    step = RunDirectory(config.directory).checkpoints()[-1][0]
    if step and config.objective.type in TRAINED_BY_TRL:
        again = f"rlad train {config.directory} --overwrite"
        return f"the student is in its last checkpoint, but TRL cannot go on from there; start again with: {again}"
    return f"a checkpoint is written, go on with: rlad train {config.directory} --resume"


def _stored_config(run: RunDirectory, config: RunConfig) -> RunConfig:
    """The config of the run that is to be resumed. `ValueError` when there is none, or when it is another run."""
    if not run.exists():
        raise ValueError(f"there is no run in {run.path} to go on with; start it without --resume, or give its run_dir.")
    stored = load_config(run.path)
    if stored.digest != config.digest:
        raise ValueError(
            f"{run.path} holds a run with another config; go on with it by `rlad train {run.path} --resume`, "
            "or choose another run_dir for this one."
        )
    return stored


def _load_student(config: RunConfig, checkpoint: Path | None) -> LanguageModel:
    try:
        return load_student(config, checkpoint)
    except ValueError as error:
        raise ValueError(_not_resumable(checkpoint, error)) if checkpoint else error from None


def _not_resumable(checkpoint: Path, error: ValueError) -> str:
    return f"checkpoint {checkpoint} cannot be resumed: {error} Delete that folder to go on from the one before it, if any."
