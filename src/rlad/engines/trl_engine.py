"""`[engine] type = "trl"`: a run's config, task and sampler around `RLADTrainer`, with the interface of every engine.

Problems and rollouts are those of the native engine, draw for draw; TRL does the rest. One process: several need a script with
`RLADTrainer` under torchrun or accelerate.
"""

import copy
import difflib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from rlad.config import Annealed, RunConfig
from rlad.engines.engine import StepResult, peak_memory
from rlad.engines.native_state import STATE, save_model
from rlad.engines.roll_out import roll_out
from rlad.engines.teacher_data import sequences_per_step
from rlad.engines.trl import RLADTrainer
from rlad.engines.trl_config import AGGREGATION, RLADConfig
from rlad.engines.trl_trainers import _arguments, _config_untouched, _optimizer, _Watched, require_finite
from rlad.language_model import EMBEDDED, LanguageModel
from rlad.metrics import Metrics, rollout_metrics
from rlad.preparation import longest_prompt
from rlad.rollouts import RolloutGroup
from rlad.seeds import stream_seed
from rlad.tasks import Problem, Task, Verdict
from rlad.teachers import Teacher

OURS = ("objective/", "teacher/", "student/", "sampler/", "reference/", "time/")
"""Of TRL's metrics those that mean what docs/metrics.md says."""


class _Trainer(_Watched, RLADTrainer):
    pass


class TRLEngine:
    """Trains one student on one device through TRL's GRPO trainer."""

    def __init__(
        self,
        config: RunConfig,
        *,
        student: LanguageModel,
        task: Task,
        teacher: Teacher | None = None,
        before_work: Callable[[], None] = lambda: None,
    ):
        """`before_work` is called before every decoding step and micro-batch; it may raise to stop the run there.

        Raises `ValueError` when TRL cannot make this run.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "`rlad train` with engine.type = 'trl' is one process, and this is one of several; start it without torchrun, "
                "or use RLADTrainer in a script of yours."
            )
        self.config, self.student, self.task, self.teacher = config, student, task, teacher
        self.before_work = before_work
        self.step = 0
        self.resumed_from: Path | None = None
        self.groups: list[RolloutGroup] = []
        self.seconds: Metrics = {}
        self.folder = TemporaryDirectory()
        self.arguments = self._arguments()
        self.trainer: Any = None

    def run(self, after_step: Callable[[StepResult], bool]) -> None:
        """Optimiser steps until `num_steps`, or until `after_step`, which is told of each, answers False."""
        if self.step == self.config.optimization.num_steps:
            return
        model: Any = self.student.model
        with _config_untouched(model):
            if self.config.optimization.kl_coef:  # TRL loads the reference from where the student says it came from
                model.config.name_or_path = str(EMBEDDED.get(self.config.student.model, self.config.student.model))
            self.trainer = self._make_trainer()
        self.trainer.add_callback(_AfterEachStep(self, after_step))
        try:
            self.trainer.train(resume_from_checkpoint=str(self.resumed_from) if self.resumed_from else None)
        finally:
            self.trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            vars(model).pop("forward", None)  # TRL's, with its fused head
            model.eval()

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
            optimizers=(_optimizer(self.config, self.student), None),
        )
        trainer.before_work = self.before_work
        trainer.remove_callback(PrinterCallback)
        return trainer

    # --- what TRL asks for --------------------------------------------------------------------------------------------

    def _problem_of(self, row: dict[str, Any]) -> Problem:
        return self.task.problem("train", int(row["prompt"]), seed=self.config.seed)

    def _roll_out(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Rollouts of problems, which the data set names by number; each stands there once for every rollout of its group."""
        index = self.step // self.config.optimization.steps_per_rollout_batch
        self.student.model.eval()  # checkpointing, which is for training mode, would switch the sampler's cache off
        self.seconds = {}
        self.groups = roll_out(
            self.config,
            self.task,
            [int(prompt) for prompt in prompts[:: self.config.rollout.group_size]],
            writer=self.student,
            student=self.student,
            seed=stream_seed(self.config.seed, "rollouts", index),
            seconds=self.seconds,
            before_work=self.before_work,
        )
        self.student.model.train()
        torch.manual_seed(stream_seed(self.config.seed, "minibatches", index))  # TRL shuffles them next
        rollouts = [(group, rollout.completion) for group in self.groups for rollout in group.rollouts]
        return {
            "prompt_ids": [list(group.prompt_token_ids) for group, _ in rollouts],
            "completion_ids": [list(completion.token_ids) for _, completion in rollouts],
            "logprobs": [list(completion.logprobs) for _, completion in rollouts],
        }

    def _rewards(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        return [None if rollout.verdict == Verdict.CANNOT_JUDGE else rollout.reward for rollout in rollouts]

    # --- arguments ----------------------------------------------------------------------------------------------------

    def _arguments(self) -> RLADConfig:
        """Those that the run's config decides, then those of [engine.trl]."""
        config, student = self.config, self.student
        loop, rollout, more = config.optimization, config.rollout, dict(config.engine.trl)
        room = longest_prompt(config, self.task, student.tokenizer, student.context_tokens)
        longest = room + rollout.max_completion_tokens
        assert not isinstance(loop.kl_coef, Annealed), "RunConfig refuses it"
        own: dict[str, Any] = {
            "objective": config.objective.model_dump(),
            "advantages": "rlad",
            "loss_type": next(name for name, mode in AGGREGATION.items() if mode == loop.aggregation),
            "scale_rewards": "group" if loop.advantage_scale == "std" else "none",
            "beta": float(loop.kl_coef),
            "num_generations": rollout.group_size,
            "generation_batch_size": sequences_per_step(config) * loop.steps_per_rollout_batch,
            "max_completion_length": rollout.max_completion_tokens,
            "temperature": rollout.temperature,
            "max_missing_teacher_share": loop.max_missing_teacher_share,
            "shuffle_dataset": False,
        }
        require_free(more, set(own) | DECIDED)
        # What [engine.trl] says is stronger than what `_arguments` gives every trainer, such as no tracker.
        return _arguments(
            lambda **given: RLADConfig(**(given | own | more)), config, student, self.folder.name, longest=longest
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, folder: Path, *, run_digest: str) -> None:
        """A checkpoint as TRL writes them, and our state beside it."""
        save_model(self.student, folder)
        (folder / STATE).parent.mkdir()
        (folder / STATE).write_text(json.dumps({"run": run_digest, "step": self.step}), encoding="utf-8")
        if self.trainer is not None:
            self.trainer._save_optimizer_and_scheduler(str(folder))
            self.trainer.state.save_to_json(str(folder / "trainer_state.json"))
        elif self.resumed_from is not None:
            for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
                (folder / name).write_bytes((self.resumed_from / name).read_bytes())

    def restore(self, folder: Path, *, run_digest: str) -> None:
        """`ValueError` when the checkpoint is of another run, or lies between two steps on one rollout batch."""
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            step, run = state["step"], state["run"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"its state cannot be read ({error}).") from None
        if run != run_digest:
            raise ValueError("it belongs to another run, whose config differs from this run directory's config.toml.")
        loop = self.config.optimization
        if step % loop.steps_per_rollout_batch and step != loop.num_steps:
            raise ValueError(
                f"step {step} lies between two steps on one rollout batch, and TRL goes on from the end of one alone "
                f"(optimization.steps_per_rollout_batch = {loop.steps_per_rollout_batch})."
            )
        self.step, self.resumed_from = step, folder if step else None


class _AfterEachStep(TrainerCallback):
    """Turns what TRL logs of a step into a `StepResult` and passes it on."""

    def __init__(self, engine: TRLEngine, after_step: Callable[[StepResult], bool]):
        self.engine, self.after_step = engine, after_step
        model = engine.student.model
        self.own = copy.deepcopy(vars(model.config)), copy.deepcopy(model.generation_config)
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `train` has written the tokenizer's special tokens into the model's configs, and so into its checkpoints.
        model: Any = self.engine.student.model
        vars(model.config).update(self.own[0])
        model.generation_config = self.own[1]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.engine.student.model.parameters() if p.grad is not None]
        require_finite(state.global_step + 1, gradient_norm=float(torch.nn.utils.get_total_norm(gradients)))

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
            "optimization/loss": logs["loss"],
            "optimization/gradient_norm": logs["grad_norm"],
            "optimization/learning_rate": logs["learning_rate"],
            "time/update/seconds": total - math.fsum(seconds.values()),
            "memory/peak/bytes": peak_memory(engine.student),
        }
        if not self.after_step(StepResult(engine.step, metrics, engine.groups)):
            control.should_training_stop = True


# --- [engine.trl] -----------------------------------------------------------------------------------------------------

DECIDED = {
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio"),
    *("weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "optim", "seed", "data_seed", "bf16", "fp16", "use_cpu"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "steps_per_generation"),
    *("num_iterations", "save_strategy", "save_steps", "logging_steps"),
    *("logging_strategy", "eval_strategy", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "use_vllm"),
    *("reward_weights", "resume_from_checkpoint", "teacher_dtype", "teacher_tokens_per_batch"),
}
"""What the other sections of a run's config say, or what the run directory, our optimiser and sampler are made of."""


def require_free(options: dict[str, Any], decided: set[str]) -> None:
    """`ValueError` unless every option is one of TRL's that no other section of the config decides."""
    known = {field.name for field in fields(RLADConfig) if field.init}
    for name in options:
        if name in decided:
            raise ValueError(
                f"engine.trl.{name} is decided by the rest of the run's config, or by its sampler; leave it out there."
            )
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known - decided), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see TRL's GRPOConfig for what there is."
            raise ValueError(f"engine.trl.{name} is no option of TRL's GRPOConfig: {hint}")
