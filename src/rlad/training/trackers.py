"""`[logging] trackers`: send a run's records also to TensorBoard, trackio or Weights & Biases. The
packages are optional.

They get the rows of metrics.jsonl and eval.jsonl under the same names, by step, with each
validation the completions of one prompt, and the run's config. They get nothing else: no
environment, command line, code, console output or figures of the machine.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from rlad.config.file import dump_config
from rlad.config.run import RunConfig
from rlad.engines.base import StepResult
from rlad.errors import RunFailedError, UserError, require_package
from rlad.runs.directory import ENVIRONMENT, EVAL, EvaluationSet, RunDirectory
from rlad.runs.statistics import Estimate
from rlad.text import first_line
from rlad.training.reporter import Reporter

COLUMNS = ("prompt", "completion", "verdict", "reward")
Table = Sequence[tuple[str, str, str, float]]

_CONTINUE = (
    "the run's own files are complete: continue with --resume; logging.trackers=[] turns the "
    "tracker off."
)


class Tracker(Protocol):
    """The interface of every tracker, which may raise any error."""

    def log(self, figures: Mapping[str, float], completions: Table, step: int) -> None: ...
    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """A tracker that writes event files to `tensorboard/` in the run directory. A resumed run
    purges later steps from them."""

    def __init__(self, config: RunConfig, run: RunDirectory, identity: str, resumed_at: int | None):
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)
        if resumed_at is None:
            self.writer.add_text("config", _as_code(dump_config(config)))

    def log(self, figures: Mapping[str, float], completions: Table, step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        if completions:
            texts = [
                f"{verdict}, reward {reward}\n\n{_as_code(prompt + completion)}"
                for prompt, completion, verdict, reward in completions
            ]
            self.writer.add_text("completions", "\n\n".join(texts), step)
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class Trackio:
    """A run of a trackio project, on this machine unless trackio's own settings say otherwise."""

    def __init__(self, config: RunConfig, run: RunDirectory, identity: str, resumed_at: int | None):
        import trackio  # pyright: ignore[reportMissingImports]

        self.library: Any = trackio
        self.run: Any = trackio.init(
            project=config.logging.project,
            name=f"{run.path.resolve().name}-{identity[:6]}",
            config=config.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, figures: Mapping[str, float], completions: Table, step: int) -> None:
        row: dict[str, Any] = dict(figures)
        if completions:
            data = [list(each) for each in completions]
            row["completions"] = self.library.Table(columns=list(COLUMNS), data=data)
        self.run.log(row, step=step)

    def close(self, *, failed: bool) -> None:
        self.run.finish()


class WeightsAndBiases(Trackio):
    """A run of a W&B project, with local files in `wandb/` of the run directory. WANDB_MODE=offline
    sends nothing. It is used like trackio."""

    def __init__(self, config: RunConfig, run: RunDirectory, identity: str, resumed_at: int | None):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.library = wandb
        self.run = wandb.init(
            project=config.logging.project,
            name=run.path.resolve().name,
            id=identity,
            resume="allow",
            dir=run.path,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                host="hidden",
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


def require_trackers(config: RunConfig) -> None:
    """Raise `UserError` if the package of a tracker is missing."""
    for name in config.logging.trackers:
        require_package(name, f"logging.trackers = {name!r}")


class Trackers(Reporter):
    """The trackers of a run, by default none. Use it as a context manager.

    For a resumed run they continue the same run after the step `resumed_at`.
    """

    def __init__(self, config: RunConfig, run: RunDirectory, *, resumed_at: int | None):
        self.config = config
        self.run = run
        self.resumed_at = resumed_at
        self.trackers: dict[str, Tracker] = {}
        self.seen = {(row["split"], row["step"]) for row in run.read(EVAL)}
        """The evaluations that were recorded and sent before an interruption."""
        self.completions: Table = []

    def __enter__(self) -> Self:
        for name in self.config.logging.trackers:
            identity = _identity(self.config, self.run)
            try:
                tracker = TRACKERS[name](self.config, self.run, identity, self.resumed_at)
            except Exception as error:  # not logged in, no connection, a package that is broken
                self._close(failed=True)
                raise UserError(
                    f"tracker {name!r} cannot start ({first_line(error)}); {_CONTINUE}"
                ) from error
            self.trackers[name] = tracker
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        problems = self._close(failed=kind is not None)
        # Where the run itself has failed, its error is the one to raise.
        if problems and kind is None:
            raise RunFailedError(
                f"the run is finished and {self.run.path} is complete, but {'; '.join(problems)}: "
                "look there for what the tracker lacks."
            )

    def _close(self, *, failed: bool) -> list[str]:
        """Close all trackers, even if one of them fails."""
        problems: list[str] = []
        for name, tracker in self.trackers.items():
            try:
                tracker.close(failed=failed)
            except Exception as error:
                problems.append(f"tracker {name!r} could not be closed ({first_line(error)})")
        return problems

    def step(self, result: StepResult, num_steps: int) -> None:
        self._log(result.metrics, [], result.step)
        for group in result.groups[:1]:
            self.completions = [(group.prompt, r.text, r.verdict, r.reward) for r in group.rollouts]

    def evaluated(self, name: EvaluationSet, step: int, estimate: Estimate) -> None:
        if (name, step) not in self.seen:
            figures = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
            named = {f"{name}/pass@1/{key}": value for key, value in figures.items()}
            self._log(named, self.completions if name == "validation" else [], step)

    def _log(self, figures: Mapping[str, float], completions: Table, step: int) -> None:
        for name, tracker in self.trackers.items():
            try:
                tracker.log(figures, completions, step)
            except Exception as error:  # no connection, a full disk
                raise RunFailedError(
                    f"tracker {name!r} failed at step {step} ({first_line(error)}); {_CONTINUE}"
                ) from error


def _identity(config: RunConfig, run: RunDirectory) -> str:
    """Return the name of the run, which every tracker continues when the run is resumed."""
    environment = json.loads((run.path / ENVIRONMENT).read_text(encoding="utf-8"))
    names = [environment.get("started"), run.path.resolve().name, config.digest]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def _as_code(text: str) -> str:
    """Return Markdown that shows a text unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())
