"""From a config to a finished run directory."""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from rlad.config import RunConfig
from rlad.config_file import dump_config, load_config, parse_config
from rlad.curve import draw_curve
from rlad.engines.native import NativeEngine, StepResult
from rlad.engines.native_state import restore_engine, save_engine
from rlad.evaluate import Estimate, evaluate, pass_at_1
from rlad.language_model import LanguageModel, load_language_model, load_tokenizer
from rlad.model_card import model_card
from rlad.objectives import OBJECTIVES
from rlad.run_dir import EVAL, METRICS, SAMPLES, RunDirectory
from rlad.stopping import Stop, StopRequested
from rlad.tasks import Split, Task, make_task
from rlad.teachers import Teacher
from rlad.teachers.compatibility import require_same_vocabulary
from rlad.teachers.local import LocalTeacher


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
    """A finished run: pass@1 on the test split before and after, 95 % intervals over prompts, and the time it took."""

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
    `StopRequested` after Ctrl-C or SIGTERM, when a checkpoint has been written.
    """
    config = config if isinstance(config, RunConfig) else parse_config(config)
    run = _open_run(config, resume=resume, overwrite=overwrite)
    return Training(config, run, reporter or Silent()).finish()


class Training:
    """One run in one process: the models, the engine and the run directory."""

    def __init__(self, config: RunConfig, run: RunDirectory, reporter: Reporter):
        self.config, self.run, self.reporter, self.stop = config, run, reporter, Stop()
        reporter.phase("loading models")
        checkpoint = run.checkpoints()[-1][1] if run.checkpoints() else None
        self.student = _load_student(config, str(checkpoint or config.student.model))
        self.task: Task = make_task(**config.task.model_dump())
        self.engine = NativeEngine(
            config,
            student=self.student,
            task=self.task,
            teacher=make_teacher(config, self.student),
            reference=_load_reference(config) if config.optimization.kl_coef else None,
            before_work=self.stop.check,
        )
        if checkpoint is None:
            run.forget_after(-1)
        else:
            restore_engine(self.engine, checkpoint, run_digest=run_digest(config))
            run.forget_after(self.engine.step)

    def finish(self) -> TrainResult:
        """Run to the end, or to a checkpoint and `StopRequested`."""
        signals = self.stop.on_signals() if current_thread() is main_thread() else nullcontext()
        started = time.monotonic()
        try:
            with signals:
                before = self._evaluate("test", 0) if self.engine.step == 0 else None
                self._steps()
                after = self._evaluate("test", self.engine.step)
        except (StopRequested, ValueError):
            self.save()
            raise
        except OSError as error:
            raise ValueError(self._could_not_write(error)) from None
        finally:
            self.task.close()
        before = before or self._recorded("test", 0) or after
        draw_curve(self.run)
        self.run.write_text("README.md", model_card(self.config, self.run.path.name, before, after))
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
        step = self.engine.step
        self._evaluate("validation", step)
        scores = {row["step"]: row["pass@1"]["mean"] for row in self.run.read(EVAL) if row["split"] == "validation"}
        best = max(scores, key=lambda s: (scores[s], -s))
        if best == step:
            self.run.write_text("best.json", json.dumps({"step": step, "validation pass@1": scores[step]}))
        self.save()
        self.run.keep_only(step, best)

    def _evaluate(self, split: Split, step: int) -> Estimate:
        """pass@1 of the present student; a result that was recorded before an interruption is not computed again."""
        estimate = self._recorded(split, step)
        if estimate is None:
            settings, rollout = self.config.evaluation, self.config.rollout
            self.reporter.phase(f"evaluating on {split} problems")
            self.student.model.eval()
            results = evaluate(
                self.student,
                self.task,
                split,
                num_problems=settings.num_test_problems if split == "test" else settings.num_validation_problems,
                num_samples=settings.num_samples,
                max_completion_tokens=rollout.max_completion_tokens,
                temperature=settings.temperature,
                prompt_format=rollout.prompt_format,
                max_batch_rows=rollout.max_batch_rows,
                before_token=self.stop.check,
            )
            estimate = pass_at_1(results)
            self.run.append(
                EVAL,
                {"step": step, "split": split, "pass@1": asdict(estimate), "results": [asdict(r) for r in results]},
            )
        self.reporter.evaluated(split, step, estimate)
        return estimate

    def _recorded(self, split: Split, step: int) -> Estimate | None:
        for row in self.run.read(EVAL):
            if row["split"] == split and row["step"] == step:
                return Estimate(**row["pass@1"])
        return None

    def save(self) -> None:
        """A checkpoint of the present step. A full disk costs this checkpoint only: `ValueError`, the former ones stay."""
        step = self.engine.step
        if any(saved == step for saved, _ in self.run.checkpoints()):
            return
        try:
            self.run.write_checkpoint(step, lambda folder: save_engine(self.engine, folder, run_digest=run_digest(self.config)))
        except (OSError, SafetensorError) as error:
            raise ValueError(self._could_not_write(error)) from None

    def _could_not_write(self, error: Exception) -> str:
        kept = [str(path) for _, path in self.run.checkpoints()]
        return (
            f"{self.run.path} could not be written at step {self.engine.step} ({error}); free some space or mend its "
            f"permissions, then `rlad train --resume` goes on from {kept[-1] if kept else 'the start'}."
        )


def make_teacher(config: RunConfig, student: LanguageModel) -> Teacher | None:
    """The teacher that the objective needs, or None. `ValueError` when it cannot score this student's tokens."""
    if not OBJECTIVES[config.objective.type].needs_teacher:
        return None
    settings = config.teacher
    assert settings is not None, "RunConfig refuses such an objective without a teacher"
    require_same_vocabulary(student.tokenizer, load_tokenizer(settings.model))
    device = str(student.model.device) if settings.device == "auto" else settings.device
    return LocalTeacher(
        load_language_model(settings.model, dtype=settings.dtype, device=device),
        temperature=config.rollout.temperature,
        tokens_per_batch=settings.tokens_per_batch,
    )


def run_digest(config: RunConfig) -> str:
    """Equal for configs that describe the same run, wherever it lies and however many steps it is to have."""
    table = config.model_dump(mode="json", exclude={"run_dir": True, "optimization": {"num_steps"}})
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _load_student(config: RunConfig, model: str) -> LanguageModel:
    return load_language_model(model, dtype=config.student.dtype, device=config.student.device, trainable=True)


def _load_reference(config: RunConfig) -> LanguageModel:
    return load_language_model(config.student.model, dtype=config.student.dtype, device=config.student.device)


def _open_run(config: RunConfig, *, resume: bool, overwrite: bool) -> RunDirectory:
    if resume:
        run = RunDirectory.open(config.directory)
        if run_digest(load_config(run.path / "config.toml")) != run_digest(config):
            raise ValueError(
                f"{run.path} holds a run with another config; resume it with `rlad train {run.path}/config.toml --resume`, "
                "or choose another run_dir for this one."
            )
        return run
    run = RunDirectory.create(config.directory, overwrite=overwrite)
    run.write_text("config.toml", dump_config(config))
    run.write_text("run.json", json.dumps(_environment(config), indent=2))
    return run


def _environment(config: RunConfig) -> dict[str, Any]:
    packages = ("rlad", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {
        "command": sys.argv,
        "seed": config.seed,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "commit": _commit(),
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), "gpu": _gpu()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit() -> str | None:
    """The commit of rlad's own checkout; None for an installed package."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__).parent
    done = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
