"""`[engine] type = "trl"`: a run's config, task and sampler around `RLADTrainer`, with the interface of every engine.

Problems and rollouts are those of the native engine, draw for draw, however many processes share them; TRL does the rest.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from rlad.config.run import RunConfig
from rlad.engines.base import ResumePoint, StepResult, peak_memory
from rlad.engines.metrics import rollout_metrics
from rlad.engines.native.checkpoint import STATE, batch_tensors, read_state
from rlad.engines.processes.ranks import ALONE, Ranks
from rlad.engines.processes.requirements import launch_kind, require_same_launch
from rlad.engines.processes.sharded import as_number, save_split_model, weights_here, whole_weights
from rlad.engines.rollout_batch import RolloutBatch
from rlad.engines.skipped_steps import SKIPPED, SkippedBatch, drop_gradient, metrics_of_skipped, require_sound_weights
from rlad.engines.trl.arguments import objective_arguments
from rlad.engines.trl.config import RLADConfig
from rlad.engines.trl.setup import Watched, adamw, config_untouched, trainer_arguments, unwrap
from rlad.engines.trl.trainer import SCORED, RLADTrainer
from rlad.engines.trl_options import DECIDED, require_free
from rlad.models.files import located
from rlad.models.loading import LanguageModel
from rlad.models.saving import save_model
from rlad.rollouts.grading import roll_out
from rlad.rollouts.prompts import longest_prompt
from rlad.rollouts.types import Metrics, RolloutGroup
from rlad.seeds import stream_seed
from rlad.tasks import Problem, Task, Verdict
from rlad.teachers.base import Teacher

OURS = ("objective/", "teacher/", "student/", "sampler/", "reference/", "time/")
"""Of TRL's metrics those that mean what docs/metrics.md says."""


class _Trainer(Watched, RLADTrainer):
    make_optimizer: Callable[[], torch.optim.Optimizer]
    scored: dict[str, Any]
    """this rank's rollouts as they were scored, before TRL shuffles them"""
    loss_is_finite: bool
    """in the micro-batches of the present step so far, on this rank"""
    gradient_norm: float
    """of the present step, before clipping, which makes NaN or 0 of a norm that is infinite"""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimizer()
        return self.optimizer

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.scored = super()._generate_and_score_completions(inputs)
        return self.scored

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.loss_is_finite &= bool(loss.isfinite())
        return loss

    def found_broken_logprobs(self) -> None:
        self.loss_is_finite = False

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.gradient_norm = as_number(norm)
        return norm


class TRLEngine:
    """Trains one student through TRL's GRPO trainer, on one device or with other ranks on theirs."""

    def __init__(
        self,
        config: RunConfig,
        *,
        ranks: Ranks = ALONE,
        student: LanguageModel,
        task: Task,
        teacher: Teacher | None = None,
        before_work: Callable[[], None] = lambda: None,
    ):
        """`before_work` is called before every decoding step and micro-batch; it may raise to stop the run there.

        Raises `ValueError` when TRL cannot make this run.
        """
        self.config, self.student, self.task, self.teacher = config, student, task, teacher
        self.before_work, self.ranks = before_work, ranks
        self.step = 0
        self.resumed_from: Path | None = None
        self.groups: list[RolloutGroup] = []
        self.share: list[RolloutGroup] = []
        """the groups of all ranks (on rank 0; elsewhere as below), and of this one"""
        self.seconds: Metrics = {}
        self.loss_is_finite = True
        """in the present step, on all ranks"""
        self.folder = TemporaryDirectory()
        self.arguments = self._arguments()
        self.trainer: Any = None

    def run(self, after_step: Callable[[StepResult], bool]) -> None:
        """Optimiser steps until `num_steps`, or until `after_step`, which is told of each, answers False."""
        if self.step == self.config.optimization.num_steps:
            return
        model: Any = self.student.model
        with config_untouched(model):
            if self.config.optimization.kl_coef:  # TRL loads the reference from where the student says it came from
                model.config.name_or_path = str(located(self.config.student.model))
            self.trainer = self._make_trainer()
        self.trainer.add_callback(_AfterEachStep(self, after_step))
        try:
            with self.ranks.working("an update of the student"):
                self.trainer.train(resume_from_checkpoint=str(self.resumed_from) if self.resumed_from else None)
        finally:
            unwrap(self.trainer, model)

    def close(self) -> None:
        if self.teacher is not None:
            self.teacher.close()

    def _make_trainer(self) -> _Trainer:
        loop, rollout = self.config.optimization, self.config.rollout
        num_batches = -(-loop.num_steps // loop.steps_per_rollout_batch)
        trainer = _Trainer(
            self.student.model,
            teacher=self.teacher,
            args=self.arguments,
            problem_of=self._problem_of,
            reward_funcs=self._rewards,
            rollout_func=self._roll_out,
            train_dataset=Dataset.from_dict({"prompt": list(map(str, range(num_batches * rollout.prompts_per_batch)))}),
            processing_class=copy.deepcopy(self.student.tokenizer),
        )
        trainer.make_optimizer = lambda: adamw(self.config, self.student)
        trainer.ranks = self.ranks
        trainer.before_work = self._before_micro_batch
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _before_micro_batch(self) -> None:
        """A signal between two steps on one rollout batch waits for the last of them: the run goes on from there alone."""
        if self.resume_point is not None:
            self.ranks.agree(self.before_work)

    # --- what TRL asks for --------------------------------------------------------------------------------------------

    def _problem_of(self, row: dict[str, Any]) -> Problem:
        return self.task.problem("train", int(row["prompt"]), seed=self.config.seed)

    def _roll_out(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Rollouts of problems, which the data set names by number; each stands there once for every rollout of its group."""
        rollout, place = self.config.rollout, f"the rollouts of step {self.step + 1}"
        index = self.step // self.config.optimization.steps_per_rollout_batch
        mine = self.ranks.share(rollout.prompts_per_batch)
        numbers = [int(prompt) for prompt in prompts[:: rollout.group_size]]
        assert numbers == [index * rollout.prompts_per_batch + i for i in mine], "TRL gives each rank its part, in order"
        seconds: Metrics = {}

        def write_share() -> list[RolloutGroup]:
            return roll_out(
                self.config,
                self.task,
                numbers,
                writer=self.student,
                student=self.student,
                seed=stream_seed(self.config.seed, "rollouts", index),
                seconds=seconds,
                before_work=self.before_work,
                first_group=mine.start,
            )

        self.student.model.eval()  # checkpointing, which is for training mode, would switch the sampler's cache off
        with whole_weights(self.student.model):
            self.share = self.ranks.together(place, write_share)
        self.groups = self.ranks.to_first(place, self.share)
        self.seconds = max(self.ranks.to_first(place, [seconds]), key=lambda own: math.fsum(own.values()))
        self.student.model.train()
        torch.manual_seed(stream_seed(self.config.seed, "minibatches", index))  # TRL shuffles them next
        rollouts = [(group, rollout.completion) for group in self.share for rollout in group.rollouts]
        return {
            "prompt_ids": [list(group.prompt_token_ids) for group, _ in rollouts],
            "completion_ids": [list(completion.token_ids) for _, completion in rollouts],
            "logprobs": [list(completion.logprobs) for _, completion in rollouts],
        }

    def _rewards(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
        rollouts = [rollout for group in self.share for rollout in group.rollouts]
        return [None if rollout.verdict == Verdict.CANNOT_JUDGE else rollout.reward for rollout in rollouts]

    # --- steps that are not finite ------------------------------------------------------------------------------------

    def skips_step(self, step: int) -> bool:
        """Whether loss or gradient of a step is not finite on any rank; the optimiser will then move nothing on all of them.

        `RunFailedError` when the weights are not finite.
        """
        place, trainer, model = f"the gradient of step {step}", self.trainer, self.student.model
        found = {"loss": float(not trainer.loss_is_finite), "gradient": float(not math.isfinite(trainer.gradient_norm))}
        found = self.ranks.largest(place, found)
        self.loss_is_finite = not found["loss"]
        if not any(found.values()):
            return False
        self.ranks.together(place, lambda: require_sound_weights(step, weights_here(model)))
        drop_gradient(model.parameters())
        return True

    def skipped_batch(self) -> SkippedBatch:
        """The rollouts of the present batch and their scores, of all ranks on rank 0; all ranks call it."""
        scored, place = self.trainer.scored, "the batch of a skipped step"
        mask, index = scored["completion_mask"].bool(), (self.step - 1) // self.config.optimization.steps_per_rollout_batch

        def of_all(name: str) -> list[torch.Tensor] | None:
            if name not in scored:
                return None
            rows = [values[kept].cpu() for values, kept in zip(scored[name], mask, strict=True)]
            return self.ranks.to_first(place, rows)

        advantages = torch.stack(self.ranks.to_first(place, list(scored["advantages"].cpu())))
        scores = dict(zip(("teacher_logprobs", "reference_logprobs", "old_logprobs"), map(of_all, SCORED), strict=True))
        return SkippedBatch(self.groups, batch_tensors(RolloutBatch(index, self.groups, advantages, **scores)))

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _arguments(self) -> RLADConfig:
        """Those that the run's config decides, then those of [engine.trl]."""
        config, student = self.config, self.student
        own, more = objective_arguments(config), dict(config.engine.trl)
        room = longest_prompt(config, self.task, student.tokenizer, student.context_tokens)
        longest = room + config.rollout.max_completion_tokens
        require_free(more, set(own) | DECIDED)
        # A micro-batch may leave experts without a gradient, and nothing else.
        has_experts = any("expert" in name for name, _ in student.model.named_parameters())
        weak: dict[str, Any] = {"ddp_find_unused_parameters": has_experts}
        # What [engine.trl] says is stronger than what `trainer_arguments` gives every trainer, such as no tracker.
        return trainer_arguments(
            lambda **given: RLADConfig(**(weak | given | own | more)),
            config,
            student,
            self.folder.name,
            longest=longest,
            num_processes=self.ranks.number,
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def resume_point(self) -> ResumePoint | None:
        """TRL goes on from the end of a rollout batch alone."""
        loop = self.config.optimization
        is_end = self.step % loop.steps_per_rollout_batch == 0 or self.step == loop.num_steps
        return "step" if is_end else None

    def save(self, folder: Path, *, run_digest: str) -> None:
        """A checkpoint as TRL writes them, and our state beside it. All ranks call it; the first writes what is not split."""
        if self.trainer is not None:
            self.trainer._save_optimizer_and_scheduler(str(folder))
            save_split_model(self.student, self.trainer, folder)
        if not self.ranks.is_first:
            return
        if not any(folder.glob("*.safetensors")):
            save_model(self.student, folder)
        (folder / STATE).parent.mkdir()
        state = {"run": run_digest, "step": self.step, "launch": launch_kind(), "num_processes": self.ranks.number}
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        if self.trainer is not None:
            self.trainer.state.save_to_json(str(folder / "trainer_state.json"))

    def restore(self, folder: Path, *, run_digest: str) -> None:
        """`ValueError` when the checkpoint is of another run, damaged, or lies between two steps on one rollout batch."""
        state = read_state(folder, "step", "launch", "num_processes", run_digest=run_digest)
        step, loop = state["step"], self.config.optimization
        if step % loop.steps_per_rollout_batch and step != loop.num_steps:
            raise ValueError(
                f"step {step} lies between two steps on one rollout batch, and TRL goes on from the end of one alone "
                f"(optimization.steps_per_rollout_batch = {loop.steps_per_rollout_batch})."
            )
        if step:
            require_same_launch(state["launch"], state["num_processes"])
            _require_readable(folder)
        self.step, self.resumed_from = step, folder if step else None


def _require_readable(folder: Path) -> None:
    """`ValueError` unless the files are whole that TRL reads when it begins; its own errors name none of them."""
    readers: dict[str, Callable[[str], Any]] = {TRAINER_STATE_NAME: TrainerState.load_from_json}
    if launch_kind() == "ddp":  # FSDP2 and DeepSpeed have formats of their own
        load = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
        readers |= {OPTIMIZER_NAME: load, SCHEDULER_NAME: load}
    for name, read in readers.items():
        try:
            read(str(folder / name))
        except Exception:  # whatever json, zip and pickle make of other bytes
            raise ValueError(f"its {name} is missing or damaged.") from None


class _AfterEachStep(TrainerCallback):
    """Turns what TRL logs of a step into a `StepResult` and passes it on."""

    def __init__(self, engine: TRLEngine, after_step: Callable[[StepResult], bool]):
        self.engine, self.after_step = engine, after_step
        model = engine.student.model
        self.own = copy.deepcopy(vars(model.config)), copy.deepcopy(model.generation_config)
        self.started, self.skipped = 0.0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `train` has written the tokenizer's special tokens into the model's configs, and so into its checkpoints.
        model: Any = self.engine.student.model
        vars(model.config).update(self.own[0])
        model.generation_config = self.own[1]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.engine.trainer.loss_is_finite = time.monotonic(), True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped = self.engine.skips_step(state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary behind the last step
            return
        engine, total = self.engine, time.monotonic() - self.started
        engine.step = state.global_step
        engine.student.model.eval()  # for what `after_step` samples; TRL's next step goes back to training mode
        own = {key: value for key, value in logs.items() if key.startswith(OURS) and value is not None}
        is_first = (engine.step - 1) % engine.config.optimization.steps_per_rollout_batch == 0
        seconds = engine.seconds | {k: v for k, v in own.items() if k.startswith("time/")} if is_first else {}
        metrics = rollout_metrics(engine.groups) | own | seconds
        metrics |= {
            # Of a loss that is not finite transformers logs another number.
            "optimization/loss": logs["loss"] if engine.loss_is_finite else math.nan,
            "optimization/gradient_norm": logs["grad_norm"],
            "optimization/learning_rate": logs["learning_rate"],
            SKIPPED: 0.0,
            "time/update/seconds": total - math.fsum(seconds.values()),
        }
        metrics |= engine.ranks.largest("the end of a step", {"memory/peak/bytes": peak_memory(engine.student)})
        metrics, batch = (metrics_of_skipped(metrics), engine.skipped_batch()) if self.skipped else (metrics, None)
        if not self.after_step(StepResult(engine.step, metrics, engine.groups, skipped=batch)):
            control.should_training_stop = True
