"""Train a run from its config to a finished run directory."""

import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from rich.console import Console

from rlad.config.file import differing_settings, dump_config, load_config, parse_config
from rlad.config.run import RunConfig
from rlad.engines.base import StepResult
from rlad.engines.making import (
    is_main_process,
    load_engine_student,
    make_engine,
    require_engine_package,
    require_pictures_fit,
)
from rlad.errors import LostProcessError, RladError, UserError
from rlad.rollouts.evaluation import evaluate
from rlad.rollouts.prompts import longest_prompt
from rlad.rollouts.turns import require_continuable_prompts
from rlad.runs.curve import curve_html
from rlad.runs.directory import (
    CONFIG,
    ENVIRONMENT,
    EVAL,
    METRICS,
    MODEL_CARD,
    CannotWriteError,
    EvaluationSet,
    RunDirectory,
)
from rlad.runs.statistics import Estimate
from rlad.stopping import Stop, StopRequested
from rlad.tasks import Task, make_task
from rlad.tasks.references import require_working_verifier
from rlad.training.console import ConsoleReporter
from rlad.training.environment import describe_environment, note_resumption
from rlad.training.named_files import fingerprints, require_same_files
from rlad.training.notes import notes_on
from rlad.training.recorder import Recorder, recorded_estimate
from rlad.training.reporter import Reporter
from rlad.training.trackers import Trackers, require_trackers


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The result of a finished run: pass@1 on the test split before and after, with 95 % intervals
    over problems, and the time it took."""

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
    a user's mistake, and `StopRequested` after Ctrl-C or SIGTERM, once a checkpoint has been
    written. Nothing is written, and with `overwrite` nothing deleted, before models, task and
    prompts have been checked. In a notebook, without a `reporter`, it shows its progress as
    `rlad train` does.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "rlad.train is called where a worker process imports your script; put it under `if "
            "__name__ == '__main__':`."
        )
    config = config if isinstance(config, RunConfig) else parse_config(config)
    require_engine_package(config)
    require_trackers(config)
    if resume and overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it; give one of the two.")
    with ExitStack() as held:
        if reporter is None:
            console = Console()
            has_bar = console.is_jupyter
            reporter = held.enter_context(ConsoleReporter(console)) if has_bar else Reporter()
        return _train(config, resume=resume, overwrite=overwrite, reporter=reporter)


def _train(config: RunConfig, *, resume: bool, overwrite: bool, reporter: Reporter) -> TrainResult:
    run = RunDirectory(config.directory)
    stop = Stop()
    stored = _stored_config(run, config) if resume else None
    if stored is None:
        run.require_free(overwrite=overwrite)
    is_there = run.exists()
    with ExitStack() as held:
        if current_thread() is main_thread():
            held.enter_context(stop.on_signals())
        if is_there and is_main_process():
            held.enter_context(run.locked())

        # All mistakes that can be found are found here, before anything is written.
        with stop.at_once():
            checkpoint = _checkpoint_to_resume(run, config) if stored else None
            task = held.enter_context(closing(make_task(**config.task.model_dump())))
            ood = config.ood_task
            ood_task = held.enter_context(closing(make_task(**ood.model_dump()))) if ood else None
            reporter.notes(notes_on(config, task, ood_task))
            reporter.phase("loading models")
            training = Training(config, task, ood_task, stop, checkpoint)
            held.enter_context(closing(training.engine))
            if checkpoint is not None:
                training.restore(checkpoint)
                _require_continuable(run, training.engine.step, config)

        if not training.engine.is_main:
            return training.follow(run)
        if stored is None:
            if not is_there:
                held.enter_context(run.locked())
                # In the meantime another process may have made a run there.
                run.require_free(overwrite=overwrite)
            run.clear()
            described = describe_environment(config.seed)
            described["sampler"] = training.engine.sampler.name
            described["files"] = fingerprints(config)
            run.write(ENVIRONMENT, json.dumps(described, indent=2))
            run.write(CONFIG, dump_config(config))
        else:
            # First, since it may refuse.
            note_resumption(run, training.engine.step, sampler=training.engine.sampler.name)
            run.delete(MODEL_CARD)  # a run without it is not finished
            if checkpoint is not None:
                run.set_aside_after(checkpoint)
            run.forget_after(training.engine.step if checkpoint else -1)
            if stored != config:  # more steps, or another address of a teacher
                run.write(CONFIG, dump_config(config))

        resumed_at = training.engine.step if checkpoint else None
        trackers = held.enter_context(Trackers(config, run, resumed_at=resumed_at))
        recorder = Recorder(config, run, (trackers, reporter), training.student.tokenizer)
        return training.finish(recorder)


class Training:
    """One run: its models, tasks and engine."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        ood_task: Task | None,
        stop: Stop,
        checkpoint: Path | None,
    ):
        self.config = config
        self.task = task
        self.ood_task = ood_task
        self.stop = stop
        self.recorder: Recorder | None = None
        require_working_verifier(task)
        with _resuming(checkpoint) if checkpoint else nullcontext():
            self.student = load_engine_student(config, checkpoint)
        require_continuable_prompts(task, self.student.tokenizer, config.rollout)
        require_pictures_fit(config, task)
        student = self.student
        longest_prompt(
            config, task, student.tokenizer, student.context_tokens, ood_task, student.vision
        )
        self.engine = make_engine(config, self.student, task, before_work=self._before_work)

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, whose student has been loaded already."""
        with _resuming(checkpoint):
            self.engine.flat_step = flat_step(RunDirectory(self.config.directory), self.config)
            self.engine.restore(checkpoint, run_digest=self.config.digest)

    def finish(self, recorder: Recorder) -> TrainResult:
        """Run to the end, or to a checkpoint and `StopRequested`."""
        self.recorder = recorder
        recorder.begins(self.engine.step)
        started = time.monotonic()
        try:
            self._train(recorder)
            after = self._test(recorder, self.engine.step)
        except (StopRequested, RladError) as error:
            can_save = not isinstance(error, CannotWriteError)
            if can_save and self.engine.resume_point is not None:
                recorder.phase("writing a checkpoint")
                recorder.save(self.engine)
            raise
        before = recorded_estimate(recorder.run, "test", 0)
        assert before is not None, "a run without it is not resumed"
        recorder.finish(before, after)
        return TrainResult(self.config.directory, before, after, time.monotonic() - started)

    def follow(self, run: RunDirectory) -> TrainResult:
        """In any process but the main one, which writes the run directory: train with it."""
        started = time.monotonic()
        self.engine.follow()
        before = recorded_estimate(run, "test", 0)
        after = recorded_estimate(run, "test", self.engine.step)
        if before is None or after is None or not run.is_finished():
            raise LostProcessError
        return TrainResult(run.path, before, after, time.monotonic() - started)

    def _train(self, recorder: Recorder) -> None:
        """Test, validate, step, record, save: to the last step, or until the budget is used up."""
        every = self.config.evaluation.every_steps
        num_steps = self.config.optimization.num_steps

        def is_over() -> bool:
            # A longer run continues from this checkpoint.
            return recorder.has_used_up_its_budget and self.engine.resume_point is not None

        def validate_if_due() -> None:
            step = self.engine.step
            if step % every == 0 or step == num_steps or is_over():
                self._evaluate(recorder, "validation", step)
                self.engine.flat_step = flat_step(recorder.run, self.config)
                recorder.save(self.engine)
                recorder.prune()
                recorder.phase("training")

        def begin() -> bool:
            recorder.save(self.engine)  # before the first row, so that no row lacks a checkpoint
            if self.engine.step == 0:
                self._test(recorder, 0)
            validate_if_due()
            recorder.phase("training")
            return not is_over()

        def after_step(result: StepResult) -> bool:
            recorder.step(result, may_stop=self.engine.resume_point is not None)
            validate_if_due()
            recorder.save_if_due(self.engine)
            return not is_over()

        self.engine.run(after_step, begin)

    def _test(self, recorder: Recorder, step: int) -> Estimate:
        """Return pass@1 on the test split. The out-of-distribution test, if there is one, is
        recorded too."""
        if self.ood_task is not None:
            self._evaluate(recorder, "ood", step)
        return self._evaluate(recorder, "test", step)

    def _evaluate(self, recorder: Recorder, name: EvaluationSet, step: int) -> Estimate:
        """Return pass@1 of the current student. A result that was recorded before an interruption
        is not computed again."""
        settings = self.config.evaluation
        num_problems, num_samples = {
            "validation": (settings.num_validation_problems, settings.num_validation_samples),
            "test": (settings.num_test_problems, settings.num_test_samples),
            "ood": (settings.num_ood_problems, settings.num_test_samples),
        }[name]
        run_evaluation = partial(
            evaluate,
            self.student,
            self.ood_task if name == "ood" and self.ood_task else self.task,
            "validation" if name == "validation" else "test",
            rollout=self.config.rollout,
            num_problems=num_problems,
            num_samples=num_samples,
            temperature=settings.temperature,
            sampler=self.engine.sampler,
            before_work=self.stop.check,
        )
        return recorder.evaluation(name, step, run_evaluation)

    def _before_work(self) -> None:
        """Report and check for a stop request before every piece of work, when nothing is half
        done."""
        self.stop.check()
        if self.recorder is not None:
            self.recorder.works()
            self.recorder.save_if_due(self.engine)


def flat_step(run: RunDirectory, config: RunConfig) -> int | None:
    """Return the step after which the objective changes, from the recorded validations of the run.

    The validation at the end of a run counts only if it is due there, so that a longer run decides
    the same.
    """
    return config.objective.flat_step(
        (row["step"], row["pass@1"]["mean"])
        for row in run.read(EVAL)
        if row["split"] == "validation" and row["step"] % config.evaluation.every_steps == 0
    )


def how_to_resume(config: RunConfig) -> str:
    """Return how to continue a run that was stopped and has written its checkpoint."""
    if not RunDirectory(config.directory).checkpoints():
        return "training had not begun and nothing is written; start it again"
    return f"a checkpoint is written, continue with: rlad train {config.directory} --resume"


def _stored_config(run: RunDirectory, config: RunConfig) -> RunConfig:
    """Return the config of the run to resume. Raises `UserError` if there is no run, or another
    one."""
    stored = load_config(run.path) if run.exists() else None
    if stored is not None and stored.digest == config.digest:
        return stored
    problem = ""
    if stored is not None:
        differences = differing_settings(config, stored)
        shown = "; ".join(differences[:3]) + "; ..." * (len(differences) > 3)
        problem = (
            f"{run.path} has a run with another config ({shown}); resume it by `rlad train "
            f"{run.path} --resume`, or choose another run_dir for this one."
        )
    if stored is None:
        problem = (
            f"there is no run in {run.path} to resume; start it without --resume, or give its "
            "run_dir."
        )
    raise UserError(problem)


def _checkpoint_to_resume(run: RunDirectory, config: RunConfig) -> Path | None:
    """Return the newest intact checkpoint; None if the run was killed before it wrote its first.

    Raises `UserError` if all are lost, or if files that the settings name have changed.
    """
    require_same_files(run, config)
    if run.checkpoints():
        return run.newest_checkpoint()[1]
    if any(any(run.read(name)) for name in (METRICS, EVAL)):
        raise UserError(
            f"{run.path} has lost its checkpoints; put a copy of one back, or start again with "
            "--overwrite."
        )
    return None


@contextmanager
def _resuming(checkpoint: Path) -> Iterator[None]:
    """Add to a `UserError` in the block that it is about this checkpoint."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be resumed: {error} Delete that folder to resume from "
            "the one before it, if any."
        ) from None


def _require_continuable(run: RunDirectory, step: int, config: RunConfig) -> None:
    num_steps = config.optimization.num_steps
    problem = ""
    if step > num_steps:
        problem = (
            f" has made {step} steps, but optimization.num_steps is {num_steps}; give it at least "
            f"{step}"
        )
    elif step > 0 and recorded_estimate(run, "test", 0) is None:
        problem = f"/{EVAL} has lost the test before training; put it back, or use --overwrite"
    if problem:
        raise UserError(f"{run.path}{problem}.")
