"""The engine for several GPUs and hosts: TRL's trainer makes the steps of a run.

TRL samples, optimises, shards the model, and saves and restores its state. We provide problems,
rewards, teacher, objective, and the records of each step. Between two steps the main process
decides when to evaluate, save and stop, and all processes carry it out together.
"""

import json
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import DistributedType
from transformers import PrinterCallback, TrainerCallback
from transformers.training_args import ParallelMode
from transformers.utils.logging import disable_progress_bar
from trl.import_utils import is_vllm_available
from trl.models.utils import unwrap_model_for_generation

from rlad.config.capabilities import require_engine
from rlad.config.run import RunConfig
from rlad.engines.base import ResumePoint, StepResult, peak_memory
from rlad.engines.metrics import rollout_metrics
from rlad.engines.trl.arguments import make_arguments
from rlad.engines.trl.orders import Orders, lost_process
from rlad.engines.trl.rollouts import TaskRollouts
from rlad.engines.trl.trainer import RLADTrainer
from rlad.errors import RunFailedError, UserError
from rlad.models.adapters import peft_config, require_lora_fits
from rlad.models.files import files_of, resolvable
from rlad.models.loading import LanguageModel
from rlad.rollouts.grading import Timer
from rlad.rollouts.sampling import OwnSampler
from rlad.rollouts.types import Completion
from rlad.rollouts.vllm_sampler import prepare_environment
from rlad.tasks import Task
from rlad.teachers import make_teacher
from rlad.teachers.base import Setting, Teacher

STATE = "trainer/state.json"
AREAS = ("objective/", "teacher/", "student/", "reference/", "sampler/", "time/")
"""Prefixes of our own metrics among TRL's."""


class _Leave(BaseException):
    """Raised to leave TRL's loop in this process; all others leave it at the same time."""


class _End(BaseException):
    """Raised to end a process that is not the main one."""


class TRLEngine(TrainerCallback):
    """The engine that trains one student in one or more processes, each with its own engine object.
    TRL's loop calls it back between two steps."""

    def __init__(
        self,
        config: RunConfig,
        *,
        student: LanguageModel,
        task: Task,
        before_work: Callable[[], None] = lambda: None,
    ):
        """Take a `student` on the CPU, without the adapter of `[student.lora]`. The main process
        calls `before_work` between two steps; it may raise to stop the run."""
        require_engine("trl", config.objective, config)
        self.config = config
        self.student = student
        self.before_work = before_work
        self.step = 0
        self._restored: str | None = None
        self._others_wait = True
        self._can_save = False
        # transformers warns of what TRL itself does, and shows its own progress bars.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
        disable_progress_bar()
        self._folder = TemporaryDirectory(prefix="rlad-trl-")
        args = make_arguments(config, self._folder.name)
        _require_places(args)
        self.orders = Orders()
        self.is_main = self.orders.is_main
        timer = Timer()
        self.rollouts = TaskRollouts(config, student, task, timer)
        # TRL must use the run's end tokens too.
        generation: Any = student.model.generation_config
        generation.eos_token_id = list(student.eos_token_ids)
        if args.use_vllm:
            prepare_environment()
            # By default vLLM ends a completion only at the end tokens in the model's folder.
            args.generation_kwargs = {"stop_token_ids": list(student.eos_token_ids)}
        self.trainer: Any = RLADTrainer(
            student.model,
            teacher=self._make_teacher(args),
            args=args,
            timer=timer,
            request_of=lambda number, *_: self.rollouts.teacher_request(number),
            reward_funcs=self.rollouts.reward,
            train_dataset=self.rollouts.dataset(),
            processing_class=student.tokenizer,
            peft_config=_peft_config(config, student),
            callbacks=[self],
        )
        self.trainer.remove_callback(PrinterCallback)
        if self.trainer.is_fsdp_enabled:
            # A checkpoint is a model folder that other tools can read.
            plugin = self.trainer.accelerator.state.fsdp_plugin
            plugin.set_state_dict_type("FULL_STATE_DICT")
        self.sampler = StudentSampler(self)

    def _make_teacher(self, args: Any) -> Teacher | str | None:
        settings: Any = self.config.teacher
        if not self.config.needs_teacher:
            return None
        if args.teacher_is_sharded:
            return settings.model
        student = self.student
        context = student.context_tokens
        setting = Setting(self.config, student.tokenizer, context, student, device=args.device)
        return make_teacher(settings, setting)

    # --- the main process -------------------------------------------------------------------------

    @property
    def resume_point(self) -> ResumePoint | None:
        """Return the resume point: TRL resumes exactly from the end of a rollout batch."""
        per_batch = self.config.optimization.steps_per_rollout_batch
        is_possible = self._can_save and self._others_wait and self.step % per_batch == 0
        return "step" if is_possible else None

    def run(
        self,
        after_step: Callable[[StepResult], bool],
        begin: Callable[[], bool] = lambda: True,
    ) -> None:
        self._begin = begin
        self._after_step = after_step
        self.everywhere("_train")
        self._others_wait = True

    def save(self, folder: Path, *, run_digest: str) -> None:
        self.everywhere("_save", folder)
        state = self._origin(run_digest) | {"step": self.step}
        (folder / STATE).parent.mkdir(exist_ok=True)
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, folder: Path, *, run_digest: str) -> None:
        """Check the checkpoint; TRL itself reads it when `run` begins."""
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            self.step = int(state["step"])
            for what, here in self._origin(run_digest).items():
                if state[what] != here:
                    there = f"{what} {state[what]!r} there, {here!r} here"
                    raise UserError(f"it is of another run: {there}.")
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"its state cannot be read ({error}).") from None
        self._restored = str(folder)

    def _origin(self, run_digest: str) -> dict[str, Any]:
        """Return what must be the same when a checkpoint is resumed."""
        teacher = self.trainer.teacher
        return {
            "run": run_digest,
            "teacher": None if teacher is None else teacher.identity,
            "processes": self.orders.num_processes,
        }

    def close(self) -> None:
        if self.is_main and self._others_wait:
            self.orders.share(_End())
        if self.trainer.teacher is not None:
            self.trainer.teacher.close()
        self._folder.cleanup()

    def everywhere(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine in all processes; the others wait for this call."""
        self.orders.share((method, arguments))
        return getattr(self, method)(*arguments)

    # --- the others -------------------------------------------------------------------------------

    def follow(self) -> None:
        """In any process but the main one: carry out the main process's orders until it ends."""
        with suppress(_End):
            self._obey()

    def _obey(self) -> None:
        """Carry out orders until the next step."""
        while (order := self.orders.share()) is not None:
            if isinstance(order, BaseException):
                raise order
            method, arguments = order
            getattr(self, method)(*arguments)

    # --- in all processes at once -----------------------------------------------------------------

    def _train(self) -> None:
        self._others_wait = False
        try:
            self.trainer.train(resume_from_checkpoint=self._restored)
        except _Leave:
            return
        except RuntimeError as error:
            raise (lost_process(error) or error) from error

    def _save(self, folder: Path) -> None:
        """Let TRL write its checkpoint into an empty folder."""
        self.trainer.args.output_dir = str(folder)
        self.trainer._save_checkpoint(self.trainer.model, trial=None)
        self.orders.wait_for_all()
        if self.is_main:
            written = folder / f"checkpoint-{self.trainer.state.global_step}"
            for path in written.iterdir():
                path.rename(folder / path.name)
            written.rmdir()
            # TRL writes this file, but it does not know the run.
            (folder / "README.md").unlink(missing_ok=True)

    def decode(self, prompts: Any, settings: dict[str, Any]) -> list[list[Completion]]:
        """Sample with our own decoder and the student's weights, wherever they are."""
        trainer = self.trainer
        trainer.model.eval()  # until the next step
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ):
            return OwnSampler.sample(self.sampler, prompts, **settings)

    # --- where TRL's loop comes back --------------------------------------------------------------

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start recording: models, optimiser and their checkpoint are loaded and on their devices
        now."""
        self._can_save = True
        self._between_steps(lambda: self._begin())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.monotonic()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        gradients = (parameter.grad for parameter in model.parameters())
        if not all(bool(one.isfinite().all()) for one in gradients if one is not None):
            raise RunFailedError(
                f"step {state.global_step + 1}: the gradient is not finite, and TRL cannot skip a "
                "step; start again with a lower optimization.learning_rate, or with "
                "engine.type=native, which skips such steps."
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "grad_norm" in logs:  # of a step, not of the whole training
            seconds = time.monotonic() - self._started
            self._between_steps(lambda: self._recorded(logs, seconds))

    def _between_steps(self, decide: Callable[[], bool]) -> None:
        """Let the main process decide for all processes whether TRL makes another step."""
        self.step = self.trainer.state.global_step
        if not self.is_main:
            self._obey()
            return
        self._others_wait = True
        goes_on = decide()
        self.orders.share(None if goes_on else _Leave())
        if not goes_on:
            raise _Leave
        self._others_wait = False

    def _recorded(self, logs: dict[str, float], seconds: float) -> bool:
        """Report a step that TRL has made; return whether to make another one."""
        groups = self.rollouts.groups
        self.rollouts.groups = []
        metrics = rollout_metrics(groups) if groups else {}
        metrics |= {key: value for key, value in logs.items() if key.startswith(AREAS)}
        elsewhere = sum(value for key, value in metrics.items() if key.startswith("time/"))
        metrics |= {
            "optimization/loss": logs["loss"],
            "optimization/gradient_norm": logs["grad_norm"],
            "optimization/learning_rate": logs["learning_rate"],
            "optimization/skipped/count": 0.0,
            "memory/peak/bytes": peak_memory(self.student),
            "time/update/seconds": seconds - elsewhere,
        }
        goes_on = self._after_step(StepResult(self.step, metrics, groups))
        if self.resume_point is not None:
            self.before_work()
        return goes_on


class StudentSampler(OwnSampler):
    """Our own decoder, for evaluation. If the student is sharded, it runs in all processes."""

    name = "trl"

    def __init__(self, engine: TRLEngine):
        super().__init__(engine.student, engine.config.rollout)
        self.description = "TRL"
        self._engine = engine

    def sample(self, prompts: Any, **settings: Any) -> list[list[Completion]]:
        kind = self._engine.trainer.accelerator.distributed_type
        if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return self._engine.decode(prompts, settings)
        # If one process stopped in the middle, the others would wait for its shard.
        settings.pop("before_token", None)
        after_group = settings.pop("after_group", lambda number, group: None)
        groups = self._engine.everywhere("decode", prompts, settings)
        for number, group in enumerate(groups):
            after_group(number, group)
        return groups


def _require_places(args: Any) -> None:
    """Raise `UserError` if TRL's trainer cannot be made in these processes."""
    if args.use_vllm and not is_vllm_available():
        raise UserError("engine.trl.use_vllm needs vLLM, which is not installed; install vllm.")
    if args.use_vllm and args.vllm_mode == "colocate" and args.use_cpu and _packs_weights():
        raise UserError(
            "engine.trl.use_vllm: on the CPU vLLM keeps packed weights, which TRL cannot update; "
            "leave it out, or use engine.type=native with rollout.engine=vllm."
        )
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            "engine.trl.fsdp shards the student over processes, but this is a single one; start it "
            "with torchrun, or leave the setting out."
        )
    if args.n_gpu > 1:
        raise UserError(
            f"this single process sees {args.n_gpu} GPUs, but TRL needs a process for each; start "
            f"it with torchrun --nproc_per_node {args.n_gpu}, or name one in CUDA_VISIBLE_DEVICES."
        )


def _packs_weights() -> bool:
    """Return whether vLLM on the CPU packs its weights for oneDNN and drops the plain ones."""
    return bool(getattr(import_module("vllm._custom_ops"), "_supports_onednn", False))


def _peft_config(config: RunConfig, student: LanguageModel) -> Any:
    """Return PEFT's settings of `[student.lora]`, which must fit the student; None without it."""
    settings = config.student.lora
    if settings is None:
        return None
    base = config.student.model
    require_lora_fits(settings, student.model.config, base=base)
    student.model.name_or_path = resolvable(str(files_of(base)))
    return peft_config(settings, base=base)
