"""`sft` and `gkd` by TRL's own trainers: same prompts, budget and optimiser as our loop, and the same interface.

    sft    loss = -mean of log πS over the completion tokens of the step, which the teacher wrote
    gkd    loss = mean of JSD_beta(πT, πS) over the completion tokens of the step, which the student wrote

TRL's optimiser state is not saved: a run goes on from before its first step or behind its last one, and from nowhere between.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

from rlad.config.run import RunConfig
from rlad.engines.base import ResumePoint, StepResult, peak_memory
from rlad.engines.metrics import rollout_metrics
from rlad.engines.native.checkpoint import STATE, read_state
from rlad.engines.trl.teacher_data import TeacherData, write_teacher_data
from rlad.models.loading import LanguageModel
from rlad.models.saving import save_model
from rlad.rollouts.grading import roll_out
from rlad.rollouts.prompts import longest_prompt
from rlad.rollouts.types import Metrics, RolloutGroup
from rlad.seeds import stream_seed
from rlad.tasks import Task

TRL_VERSION = "1.16"


class TRLDistillationEngine:
    """Trains one student on one device through TRL."""

    def __init__(
        self,
        config: RunConfig,
        *,
        student: LanguageModel,
        teacher: LanguageModel,
        task: Task,
        before_work: Callable[[], None] = lambda: None,
    ):
        """`before_work` is called before every decoding step and micro-batch; it may raise to stop the run there.

        Raises `ValueError` when TRL is missing or the two models cannot be compared over one vocabulary.
        """
        require_trl(config.objective.type)
        if config.objective.type == "gkd":
            require_one_vocabulary(*(each.model.config.get_text_config().vocab_size for each in (student, teacher)))
        self.config, self.student, self.teacher, self.task = config, student, teacher, task
        self.before_work = before_work
        self.step = 0

    def run(self, after_step: Callable[[StepResult], bool]) -> None:
        """Optimiser steps until `num_steps`, or until `after_step`, which is told of each, answers False."""
        if self.step == self.config.optimization.num_steps:
            return
        from rlad.engines.trl.setup import unwrap

        device = self.student.model.device
        with TemporaryDirectory() as folder, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            trainer, figures = self._sft(folder) if self.config.objective.type == "sft" else self._gkd(folder)
            trainer.before_work = self.before_work
            trainer.add_callback(_AfterEachStep(self, figures, after_step))
            try:
                trainer.train()
            finally:
                for model in (self.student.model, self.teacher.model):
                    unwrap(trainer, model)

    def _sft(self, folder: str) -> tuple[Any, "Figures"]:
        from rlad.engines.trl.distillation_trainers import sft_trainer

        data = write_teacher_data(
            self.config, self.task, teacher=self.teacher, student=self.student, before_work=self.before_work
        )
        return sft_trainer(self.config, self.student, data, folder), lambda step: (_sft_figures(self.config, data, step), ())

    def _gkd(self, folder: str) -> tuple[Any, "Figures"]:
        from rlad.engines.trl.distillation_trainers import gkd_trainer

        config, student = self.config, self.student
        seconds: Metrics = {}

        def write(indices: Sequence[int]) -> list[RolloutGroup]:
            return roll_out(
                config,
                self.task,
                indices,
                writer=student,
                student=student,
                seed=stream_seed(config.seed, "rollouts", self.step),
                seconds=seconds,
                before_work=self.before_work,
            )

        def figures(step: int) -> tuple[Metrics, Sequence[RolloutGroup]]:
            groups = trainer.groups
            num_tokens = sum(len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts)
            return rollout_metrics(groups) | seconds | {"teacher/tokens/count": float(num_tokens)}, groups

        room = longest_prompt(config, self.task, student.tokenizer, student.context_tokens)
        trainer = gkd_trainer(config, student, self.teacher, room + config.rollout.max_completion_tokens, folder)
        trainer.roll_out = write
        return trainer, figures

    def close(self) -> None:
        """There is nothing to release."""

    @property
    def resume_point(self) -> ResumePoint | None:
        """TRL cannot go on with such a run."""
        return "step" if self.step in (0, self.config.optimization.num_steps) else None

    def save(self, folder: Path, *, run_digest: str) -> None:
        save_model(self.student, folder)
        (folder / STATE).parent.mkdir()
        (folder / STATE).write_text(json.dumps({"run": run_digest, "step": self.step}), encoding="utf-8")

    def restore(self, folder: Path, *, run_digest: str) -> None:
        """`ValueError` when the checkpoint is of another run, or of a step from which TRL cannot go on."""
        self.step = step = read_state(folder, "step", run_digest=run_digest)["step"]
        if self.resume_point is None:
            raise ValueError(
                f"objective {self.config.objective.type!r} is trained by TRL, which cannot go on from step {step}; start the "
                "run again with --overwrite."
            )


Figures = Callable[[int], tuple[Metrics, Sequence[RolloutGroup]]]
"""The metrics of a step (from 1) that its completions decide, and their groups."""


class _AfterEachStep(TrainerCallback):
    """Turns what transformers logs of a step into a `StepResult` and passes it on."""

    def __init__(self, engine: TRLDistillationEngine, figures: Figures, after_step: Callable[[StepResult], bool]):
        self.engine, self.figures, self.after_step = engine, figures, after_step
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from rlad.engines.trl.distillation_trainers import require_finite

        gradients = [p.grad for p in self.engine.student.model.parameters() if p.grad is not None]
        require_finite(state.global_step + 1, gradient_norm=float(torch.nn.utils.get_total_norm(gradients)))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary behind the last step
            return
        seconds = time.monotonic() - self.started
        self.engine.step = state.global_step
        self.engine.student.model.eval()  # for what `after_step` samples; TRL's next step goes back to training mode
        metrics, groups = self.figures(self.engine.step)
        metrics = metrics | {
            "optimization/loss": logs["loss"],
            "optimization/gradient_norm": logs["grad_norm"],
            "optimization/learning_rate": logs["learning_rate"],
            "time/update/seconds": seconds - _rollout_seconds(metrics),
            "memory/peak/bytes": peak_memory(self.engine.student),
        }
        if not self.after_step(StepResult(self.engine.step, metrics, groups)):
            control.should_training_stop = True


def _rollout_seconds(metrics: Metrics) -> float:
    """Of the time between the begin and the end of a step, what is not its update."""
    return metrics.get("time/generation/seconds", 0.0) + metrics.get("time/rewards/seconds", 0.0)


def _sft_figures(config: RunConfig, data: TeacherData, step: int) -> Metrics:
    """Completion lengths of a step, and what the teacher wrote.

    Its tokens are counted in the step in which another method would have it score as many completions, so that
    `max_teacher_tokens` ends this run where it ends those.
    """
    lengths = [float(len(data.sequences[i][1])) for i in data.steps[step - 1]]
    metrics = {
        "rollout/completion_tokens/mean": sum(lengths) / len(lengths),
        "rollout/completion_tokens/max": max(lengths),
    }
    batch, part = divmod(step - 1, config.optimization.steps_per_rollout_batch)
    if part == 0 and batch < len(data.tokens_written):
        metrics["teacher/tokens/count"] = float(data.tokens_written[batch])
    if step == 1:
        metrics |= {"time/teacher/seconds": data.seconds, "sft/accepted/frac": data.accepted_share}
    return metrics


def require_trl_version(objective: str) -> None:
    """`ValueError` unless the TRL that this module was written for is installed."""
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ValueError(_no_trl(objective, "is not installed")) from None
    if not version.startswith(f"{TRL_VERSION}."):
        raise ValueError(_no_trl(objective, f"is version {version} instead of {TRL_VERSION}"))


def require_trl(objective: str) -> None:
    """`ValueError` unless that TRL can also be imported."""
    require_trl_version(objective)
    try:
        import rlad.engines.trl.distillation_trainers  # noqa: F401
    except (ImportError, RuntimeError) as error:  # TRL makes the latter of the former
        first_line, _, _ = str(error).partition("\n")
        raise ValueError(_no_trl(objective, f"cannot be imported ({first_line})")) from None


def _no_trl(objective: str, found: str) -> str:
    return f"objective {objective!r} is trained by TRL, and trl {found}; install it with: pip install 'rlad[trl]'."


def require_one_vocabulary(ours: int, theirs: int) -> None:
    """`ValueError` when student and teacher have different numbers of token probabilities."""
    if ours != theirs:
        raise ValueError(
            f"objective 'gkd' compares whole distributions, but the student has {ours} token probabilities and the teacher "
            f"{theirs}; pad both vocabularies to one size, or use objective=opd, which compares those of sampled tokens."
        )
