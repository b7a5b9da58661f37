"""`[logging] trackers`: what a run records, also sent to TensorBoard, trackio or Weights & Biases.
Their packages are optional.

They get the rows of metrics.jsonl and eval.jsonl under the same names, by step, and with each
validation the completions of one prompt; and the run's config. Nothing else: no environment,
command line, code, console output or figures of the machine.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlad.config.file import dump_config
from rlad.config.run import RunConfig
from rlad.errors import RunFailedError, UserError
from rlad.runs.directory import ENVIRONMENT, EVAL, EvaluationSet, RunDirectory
from rlad.runs.guards import GuardWarning
from rlad.runs.statistics import Estimate

if TYPE_CHECKING:
    from rlad.engines.base import StepResult

COLUMNS = ("prompt", "completion", "verdict", "reward")
Table = Sequence[tuple[str, str, str, float]]


class Tracker(Protocol):
    """What every tracker is asked for; it may raise what it likes."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...
    def log_completions(self, rows: Table, step: int) -> None: ...
    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run directory; a resumed run purges the later steps of
    its event files."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, *, identity: str, resumed_at: int | None
    ):
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)
        if resumed_at is None:
            self.writer.add_text("config", _as_code(dump_config(config)))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_completions(self, rows: Table, step: int) -> None:
        texts = [
            f"{verdict}, reward {reward}\n\n{_as_code(prompt + completion)}"
            for prompt, completion, verdict, reward in rows
        ]
        self.writer.add_text("completions", "\n\n".join(texts), step)

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class Trackio:
    """A run of a trackio project, on this machine unless trackio's own settings say otherwise."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, *, identity: str, resumed_at: int | None
    ):
        import trackio  # pyright: ignore[reportMissingImports]

        self.trackio = trackio
        self.run = trackio.init(
            project=config.logging.project,
            name=f"{run.path.resolve().name}-{identity[:6]}",
            config=config.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def log_completions(self, rows: Table, step: int) -> None:
        self.run.log(
            {
                "completions": self.trackio.Table(
                    columns=list(COLUMNS), data=[list(row) for row in rows]
                )
            },
            step=step,
        )

    def close(self, *, failed: bool) -> None:
        self.run.finish()


class WeightsAndBiases:
    """A run of a W&B project, its local files in `wandb/` of the run directory; WANDB_MODE=offline
    sends nothing."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, *, identity: str, resumed_at: int | None
    ):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=config.logging.project,
            name=run.path.resolve().name,
            id=identity,
            resume="allow",
            dir=run.path,
            config=config.model_dump(mode="json"),
            settings={
                **{
                    "console": "off",
                    "host": "hidden",
                    "disable_git": True,
                    "disable_code": True,
                    "disable_job_creation": True,
                },
                **{
                    "x_disable_meta": True,
                    "x_disable_stats": True,
                    "x_disable_machine_info": True,
                    "x_save_requirements": False,
                },
            },
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def log_completions(self, rows: Table, step: int) -> None:
        self.run.log(
            {
                "completions": self.wandb.Table(
                    columns=list(COLUMNS), data=[list(row) for row in rows]
                )
            },
            step=step,
        )

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WeightsAndBiases}


def require_trackers(config: RunConfig) -> None:
    """`UserError` when the package of a tracker is missing."""
    for name in config.logging.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.trackers names {name!r}, whose package is not installed; install it "
                f"with: pip install 'rlad[{name}]'."
            )


class Tracked:
    """A reporter that tells another one, and the trackers, what happens in a run."""

    def __init__(self, reporter: Any, trackers: Mapping[str, Tracker], run: RunDirectory):
        self.reporter, self.trackers = reporter, trackers
        self.seen = {(row["split"], row["step"]) for row in run.read(EVAL)}
        """evaluations that an earlier process has made, of which it has told the trackers"""
        self.completions: Table = []

    def phase(self, name: str) -> None:
        self.reporter.phase(name)

    def step(self, result: "StepResult", num_steps: int) -> None:
        self._tell("log", result.metrics, result.step)
        for group in result.groups[:1]:
            self.completions = [(group.prompt, r.text, r.verdict, r.reward) for r in group.rollouts]
        self.reporter.step(result, num_steps)

    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None:
        self.reporter.evaluated(name, step, estimate)
        if (name, step) in self.seen:
            return
        figures = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
        self._tell(
            "log",
            {f"{name}/pass@1/{reduction}": value for reduction, value in figures.items()},
            step,
        )
        if name == "validation" and self.completions:
            self._tell("log_completions", self.completions, step)

    def warned(self, warning: GuardWarning) -> None:
        self.reporter.warned(warning)

    def _tell(self, what: Literal["log", "log_completions"], content: Any, step: int) -> None:
        for name, tracker in self.trackers.items():
            try:
                getattr(tracker, what)(content, step)
            except Exception as error:  # what a tracker raises is its own affair
                raise RunFailedError(
                    f"tracker {name!r} failed at step {step} ({_first_line(error)}); what the run "
                    "itself has written is whole: "
                    "go on with --resume, without the tracker by logging.trackers=[]."
                ) from error


@contextmanager
def tracked(
    config: RunConfig, run: RunDirectory, reporter: Any, *, resumed_at: int | None
) -> Iterator[Any]:
    """A reporter that also tells the run's trackers; of a resumed run they go on with the same run
    behind that step."""
    if not config.logging.trackers:
        yield reporter
        return
    trackers: dict[str, Tracker] = {}
    failed = True
    try:
        for name in config.logging.trackers:
            trackers[name] = _start(name, config, run, resumed_at)
        yield Tracked(reporter, trackers, run)
        failed = False
    finally:
        _close(trackers, failed=failed)


def _close(trackers: Mapping[str, Tracker], *, failed: bool) -> None:
    """Close all of them; what one raises then is not raised where the run has failed, which is to
    be heard of first."""
    problems: list[str] = []
    for name, tracker in trackers.items():
        try:
            tracker.close(failed=failed)
        except Exception as error:  # what a tracker raises is its own affair
            problems.append(f"tracker {name!r} could not be closed ({_first_line(error)})")
    if problems and not failed:
        raise RunFailedError(f"{'; '.join(problems)}; what the run itself has written is whole.")


def _start(name: str, config: RunConfig, run: RunDirectory, resumed_at: int | None) -> Tracker:
    started = json.loads((run.path / ENVIRONMENT).read_text(encoding="utf-8")).get("started")
    identity = hashlib.sha256(
        json.dumps([started, run.path.resolve().name, config.digest]).encode()
    ).hexdigest()[:16]
    try:
        return TRACKERS[name](config, run, identity=identity, resumed_at=resumed_at)
    except Exception as error:  # not logged in, no such project, a package that is broken
        raise UserError(
            f"tracker {name!r} cannot start ({_first_line(error)}); mend that, or leave it out of "
            "logging.trackers."
        ) from error


def _as_code(text: str) -> str:
    """Markdown that shows a text as it stands."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
