"""From a config to a finished run directory."""

import json
import math
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from rlad.config.file import dump_config, load_config, parse_config
from rlad.config.run import RunConfig
from rlad.engines.base import StepResult
from rlad.engines.make import make_engine
from rlad.errors import RladError, UserError
from rlad.models.loading import LanguageModel
from rlad.models.student import load_student
from rlad.rollouts.evaluation import evaluate
from rlad.rollouts.prompts import longest_prompt
from rlad.runs.curve import CURVE, curve_html, draw_curve
from rlad.runs.directory import (
    CONFIG,
    ENVIRONMENT,
    EVAL,
    METRICS,
    MODEL_CARD,
    SAMPLES,
    CannotWriteError,
    EvaluationSet,
    RunDirectory,
)
from rlad.runs.model_card import model_card
from rlad.runs.results import ProblemResult, pass_at_1
from rlad.runs.statistics import Estimate
from rlad.stopping import Stop, StopRequested
from rlad.tasks import Task, make_task
from rlad.tasks.probe import require_working_verifier
from rlad.training.console import shown
from rlad.training.environment import describe_environment, note_resumption
from rlad.training.reporter import Reporter, Silent
from rlad.training.trackers import require_trackers, tracked
from rlad.training.watch import RunWatch


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run: pass@1 on the test split before and after, 95 % intervals over problems, and
    the time it took."""

    run_dir: Path
    before: Estimate
    after: Estimate
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"run_dir": str(self.run_dir)}

    def _repr_html_(self) -> str:
        figures = {
            "test pass@1 before": self.before,
            "test pass@1 after": self.after,
            "run directory": self.run_dir,
        }
        return curve_html(RunDirectory(self.run_dir), figures)


def train(
    config: RunConfig | dict[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train a student as `config` says and write its run directory.

    `config` may be a nested dictionary as in a TOML file. Raises `UserError` with one sentence for
    a user's mistake, and `StopRequested` after Ctrl-C or SIGTERM, when a checkpoint has been
    written. Nothing is written, and with `overwrite` nothing deleted, before models, task and
    prompts have been found good. In a notebook, without a `reporter`, it shows its progress as
    `rlad train` does.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "rlad.train is called where a worker process imports your script; put it under `if "
            "__name__ == '__main__':`."
        )
    config = config if isinstance(config, RunConfig) else parse_config(config)
    require_trackers(config)
    if resume and overwrite:
        raise UserError(
            "--resume goes on with a run and --overwrite deletes it; give one of the two."
        )
    with shown(reporter) as shown_reporter:
        return _train(config, resume=resume, overwrite=overwrite, reporter=shown_reporter)


def _train(
    config: RunConfig, *, resume: bool, overwrite: bool, reporter: Reporter | None
) -> TrainResult:
    run = RunDirectory(config.directory)
    stored = _stored_config(run, config) if resume else None
    if stored is None:
        run.require_free(overwrite=overwrite)
    stop, is_there = Stop(), run.exists()
    with ExitStack() as held:
        if current_thread() is main_thread():
            held.enter_context(stop.on_signals())
        if is_there:
            held.enter_context(run.locked())
        with stop.at_once():
            checkpoint = _newest_checkpoint(run) if stored else None
            task = held.enter_context(closing(make_task(**config.task.model_dump())))
            ood = config.ood_task
            ood_task = held.enter_context(closing(make_task(**ood.model_dump()))) if ood else None
            training = Training(config, run, task, ood_task, reporter or Silent(), checkpoint, stop)
            held.enter_context(closing(training.engine))
        if stored is None:
            if not is_there:
                held.enter_context(run.locked())
                run.require_free(
                    overwrite=overwrite
                )  # by now another process may have made a run there
            run.clear()
            run.write(ENVIRONMENT, json.dumps(describe_environment(config.seed), indent=2))
            run.write(CONFIG, dump_config(config))
        else:
            run.delete(MODEL_CARD)  # a run without it is not finished
            if checkpoint is not None:
                run.set_aside_after(checkpoint)
            run.forget_after(training.engine.step if checkpoint else -1)
            note_resumption(run, training.engine.step)
            if stored != config:  # more steps, or a teacher that is reached in another way
                run.write(CONFIG, dump_config(config))

        resumed_at = training.engine.step if checkpoint else None
        training.reporter = held.enter_context(
            tracked(config, run, training.reporter, resumed_at=resumed_at)
        )
        return training.finish()


class Training:
    """One run in one process, or in each of several: the models, the engine and the run
    directory."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        task: Task,
        ood_task: Task | None,
        reporter: Reporter,
        checkpoint: Path | None,
        stop: Stop,
    ):
        self.config, self.run, self.task, self.ood_task = config, run, task, ood_task
        self.reporter, self.stop, self.saved_at = reporter, stop, math.inf
        reporter.phase("loading models")
        require_working_verifier(task)
        self.student = _load_student(config, checkpoint)
        longest_prompt(config, task, self.student.tokenizer, self.student.context_tokens, ood_task)
        self.engine = make_engine(config, self.student, task, before_work=self._before_work)
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: Path) -> None:
        try:
            self.engine.restore(checkpoint, run_digest=self.config.digest)
        except ValueError as error:
            raise UserError(_not_resumable(checkpoint, error)) from None
        step, num_steps = self.engine.step, self.config.optimization.num_steps
        if step > num_steps:
            raise UserError(
                f"{self.run.path} has made {step} steps, but optimization.num_steps is "
                f"{num_steps}; give it at least {step}."
            )
        if step > 0 and _recorded(self.run, "test", 0) is None:
            raise UserError(
                f"{self.run.path}/{EVAL} has lost the test before training; put it back, or use "
                "--overwrite."
            )

    def finish(self) -> TrainResult:
        """Run to the end, or to a checkpoint and `StopRequested`."""
        started = time.monotonic()
        try:
            self.save()  # before the first row, so that no row is without a checkpoint
            before = self._test(0) if self.engine.step == 0 else _recorded(self.run, "test", 0)
            self._train()
            after = self._test(self.engine.step)
        except CannotWriteError:
            raise
        except (StopRequested, RladError):
            if self.engine.resume_point is not None:
                self.reporter.phase("writing a checkpoint")
                self.save()
            raise
        assert before is not None, "a run without it is not resumed"
        self.run.write(CURVE, draw_curve(self.run))
        self.run.write(MODEL_CARD, model_card(self.config, self.run, before, after))
        return TrainResult(self.run.path, before, after, time.monotonic() - started)

    def _train(self) -> None:
        """Steps to the end, each recorded; validation and a checkpoint at its times and behind the
        last step."""
        settings, num_steps = self.config.evaluation, self.config.optimization.num_steps
        spent = _spent_by(self.run)
        watch = RunWatch(self.config, self.run, self.reporter)

        def is_over() -> bool:
            limits = (
                self.config.optimization.max_seconds,
                self.config.optimization.max_teacher_tokens,
            )
            return any(
                limit is not None and used >= limit
                for used, limit in zip(spent, limits, strict=True)
            )

        def after_step(result: StepResult) -> bool:
            self.run.append(METRICS, {"step": result.step, **result.metrics})
            if result.groups:
                self.run.append(SAMPLES, {"step": result.step} | self._sample_row(result))
            watch.after_step(result, may_stop=self.engine.resume_point is not None)
            self.reporter.step(result, num_steps)
            spent[:] = [used + new for used, new in zip(spent, _spent(result.metrics), strict=True)]
            if result.step % settings.every_steps == 0 or result.step == num_steps or is_over():
                self._validate()
                self.reporter.phase("training")
            self._save_if_old()
            return not is_over()

        if (
            self.engine.step % settings.every_steps == 0
            or self.engine.step == num_steps
            or is_over()
        ):
            self._validate()
        if not is_over():
            self.reporter.phase("training")
            self.engine.run(after_step)

    def _sample_row(self, result: StepResult) -> dict[str, Any]:
        """The first group of a step with the text of each token, and what the update did with
        them."""
        row, decode = result.groups[0].to_json(), self.student.tokenizer.decode
        for i, rollout in enumerate(row["rollouts"]):
            rollout["tokens"] = [decode([token]) for token in rollout["completion"]["token_ids"]]
            rollout["imitation"] = (result.imitation or {}).get(i)
        return row

    def _validate(self) -> None:
        """Validation, then a checkpoint; the last and the best ones are kept."""
        self._evaluate("validation", self.engine.step)
        self.save()
        self.run.keep(
            last=self.config.checkpoints.keep_last, best=self.config.checkpoints.keep_best
        )

    def _test(self, step: int) -> Estimate:
        """pass@1 on the test split; the out-of-distribution test, where there is one, is recorded
        too."""
        if self.ood_task is not None:
            self._evaluate("ood", step)
        return self._evaluate("test", step)

    def _evaluate(self, name: EvaluationSet, step: int) -> Estimate:
        """pass@1 of the present student; a result that was recorded before an interruption is not
        computed again."""
        estimate = _recorded(self.run, name, step)
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
                before_work=self.stop.check,
            )
            estimate = self._record(name, step, results)
        self.reporter.evaluated(name, step, estimate)
        return estimate

    def _record(self, name: EvaluationSet, step: int, results: Sequence[ProblemResult]) -> Estimate:
        estimate = pass_at_1(results)
        rows = [asdict(result) for result in results]
        self.run.append(
            EVAL, {"step": step, "split": name, "pass@1": asdict(estimate), "results": rows}
        )
        return estimate

    def save(self) -> None:
        """A checkpoint of the present state, unless there is one."""
        step, digest = self.engine.step, self.config.digest
        with_rollouts = self.engine.resume_point == "rollouts"
        path = self.run.checkpoint(step, with_rollouts=with_rollouts)

        if not path.is_dir():
            self.run.write_checkpoint(
                step,
                lambda folder: self.engine.save(folder, run_digest=digest),
                run_digest=digest,
                with_rollouts=with_rollouts,
            )
        self.saved_at = path.stat().st_mtime

    def _before_work(self) -> None:
        """Is called before every piece of work, between which nothing is half done."""
        self.stop.check()
        self._save_if_old()

    def _save_if_old(self) -> None:
        due = self.saved_at + self.config.checkpoints.every_seconds  # never, until training begins
        if time.time() > due and self.engine.resume_point is not None:
            self.save()


def _spent(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Seconds and teacher tokens of one step."""
    return sum(v for k, v in metrics.items() if k.startswith("time/")), metrics.get(
        "teacher/tokens/count", 0.0
    )


def _spent_by(run: RunDirectory) -> list[float]:
    """The same of all steps that are recorded."""
    return [sum(column) for column in zip(*map(_spent, run.read(METRICS)), strict=True)] or [
        0.0,
        0.0,
    ]


def _recorded(run: RunDirectory, name: EvaluationSet, step: int) -> Estimate | None:
    for row in run.read(EVAL):
        if row["split"] == name and row["step"] == step:
            return Estimate(**row["pass@1"])
    return None


def how_to_go_on(config: RunConfig) -> str:
    """What to type when a run was stopped and its checkpoint is written."""
    checkpoints = RunDirectory(config.directory).checkpoints()
    if not checkpoints:
        return "training had not begun and nothing is written; start it again"
    return f"a checkpoint is written, go on with: rlad train {config.directory} --resume"


def _stored_config(run: RunDirectory, config: RunConfig) -> RunConfig:
    """The config of the run that is to be resumed. `UserError` when there is none, or when it is
    another run."""
    if not run.exists():
        raise UserError(
            f"there is no run in {run.path} to go on with; start it without --resume, or give its "
            "run_dir."
        )
    stored = load_config(run.path)
    if stored.digest != config.digest:
        raise UserError(
            f"{run.path} holds a run with another config; go on with it by `rlad train {run.path} "
            "--resume`, "
            "or choose another run_dir for this one."
        )
    return stored


def _newest_checkpoint(run: RunDirectory) -> Path | None:
    """The newest whole one; None when the run was killed before it wrote its first. `UserError`
    when all are lost."""
    if run.checkpoints():
        return run.newest_checkpoint()[1]
    if any(True for name in (METRICS, EVAL) for _ in run.read(name)):
        raise UserError(
            f"{run.path} has lost its checkpoints; put a copy of one back, or start again with "
            "--overwrite."
        )
    return None


def _load_student(config: RunConfig, checkpoint: Path | None) -> LanguageModel:
    try:
        return load_student(config, checkpoint)
    except ValueError as error:
        raise UserError(_not_resumable(checkpoint, error)) if checkpoint else error from None


def _not_resumable(checkpoint: Path, error: ValueError) -> str:
    return f"checkpoint {checkpoint} cannot be resumed: {error} Delete that folder to go on from the one before it, if any."
