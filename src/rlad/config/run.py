"""Every setting of a run: type, range, default and a one-line meaning. Imports no torch.

A run is described by one TOML file; dotted overrides (`optimization.learning_rate=1e-5`) change
single values. Unknown keys are refused, with the nearest valid name as a hint. Defaults are the
papers' where they state one. The run of the embedded tiny models is `rlad/embedded/run.toml`.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from rlad.config.engine import EngineConfig
from rlad.config.objective import ObjectiveConfig, TRRDConfig
from rlad.config.rollout import CorrectionConfig, VLLMConfig
from rlad.config.task import EpisodesConfig, TaskConfig, with_changes
from rlad.config.teacher import TeacherConfig
from rlad.config.types import (
    AnnealedNonNegative,
    Count,
    LearningRate,
    Location,
    Mark,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
    ShareBelowOne,
    Support,
)

# --- models ---------------------------------------------------------------------------------------


class LoraConfig(Section):
    """A low-rank adapter, W + alpha / rank * B A. It is trained, and the model's own weights stay
    fixed. Needs `rlad[peft]`."""

    rank: Count = 16
    """rank of the matrices A and B"""
    alpha: Positive = 32.0
    """the adapter is scaled by alpha / rank"""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """the linear layers that get an adapter, such as ["q_proj", "v_proj"]; "all-linear" means all
    but the output layer"""


class StudentConfig(Section):
    """The model that is trained."""

    model: Location
    """Hugging Face name, folder, `embedded/student` or `smollm2-135m`"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """data type of the forward pass; trained weights and all log-probs are float32"""
    device: Annotated[str, Mark.ROUNDING] = "auto"
    """a torch device such as `cuda:0` or `cpu`; `auto` uses the GPU if there is one"""
    gradient_checkpointing: Annotated[bool, Mark.ROUNDING] = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    end_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """further tokens that end a completion, such as ["<|im_end|>"] for a base model whose teacher
    is a chat model"""
    train_vision: bool = False
    """of a student that reads pictures, train the vision tower too; by default only the language
    part is trained"""
    lora: LoraConfig | None = None
    """[student.lora] trains an adapter instead of all weights"""

    def problems(self) -> Iterator[str]:
        if self.train_vision and self.lora:
            yield (
                "student.train_vision = true trains the vision tower's own weights, and "
                "[student.lora] none of the model's; leave one of them out"
            )


# --- the loop -------------------------------------------------------------------------------------


class RolloutConfig(Section):
    """How many completions the student samples, of which length and how."""

    prompts_per_batch: Count = 32
    """prompts in one rollout batch"""
    group_size: Annotated[int, Field(strict=True, ge=2)] = 8
    """rollouts of each prompt; with a single one every advantage would be 0"""
    max_prompt_tokens: Count | None = None
    """longest prompt that is accepted; by default as long as the context allows"""
    max_completion_tokens: Count = 2048
    """longer completions are cut off"""
    temperature: Positive = 1.0
    """sampling temperature; log-probs of student, teacher and reference are computed at it too"""
    prompt_format: Literal["auto", "plain", "chat"] = "auto"
    """`auto` uses the chat template if the tokenizer has one"""
    system_prompt: Annotated[str, Field(min_length=1)] | None = None
    """system prompt of every conversation that has none of its own; needs a chat template"""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """variables of the chat template, such as { enable_thinking = false }"""
    rewritten_turns: Literal["refuse", "keep"] = "refuse"
    """what to do in episodes of several turns when the chat template changes an earlier turn of the
    student (such as removing its thoughts): refuse to run, or keep the turns as written"""
    max_batch_rows: Annotated[Count, Mark.ROUNDING] = 256
    """most completions decoded at once"""
    cuda_graphs: Annotated[bool, Mark.ROUNDING] = False
    """decode with CUDA graphs, so that a step of our own decoder does not pay for launching its
    kernels; not yet run on a GPU"""
    engine: Literal["native", "vllm", "auto"] = "native"
    """what samples the completions: our own decoder, or vLLM in the same process; `auto` uses vLLM
    if it is installed and supports the device and the model"""
    vllm: VLLMConfig = VLLMConfig()
    correction: CorrectionConfig = CorrectionConfig()
    max_staleness: Annotated[int, Field(strict=True, ge=0, le=1)] = 0
    """1: a vLLM server samples the next rollout batch while the student trains on the current one,
    so with the weights before its updates; `rollout.correction` corrects for the difference"""

    def problems(self) -> Iterator[str]:
        if self.vllm.urls and self.engine != "vllm":
            yield (
                f"rollout.vllm.urls names servers, but rollout.engine is {self.engine!r}; set it "
                "to 'vllm', or leave the urls out"
            )
        if self.max_staleness and not self.vllm.urls:
            yield (
                "rollout.max_staleness = 1 needs a vLLM server that samples while this process "
                "trains; name it in rollout.vllm.urls with rollout.engine = 'vllm', or set "
                "max_staleness to 0"
            )

    of_method: ClassVar[frozenset[str]] = frozenset({"engine", "vllm", "correction"})
    """The settings in which methods of one comparison may differ: the sampler, and the correction
    for it. All others belong to the comparison."""


class OptimizationConfig(Section):
    """How the student is updated from its rollouts."""

    num_steps: Annotated[Count, Mark.LENGTH] = 100
    """optimiser steps of the whole run"""
    max_seconds: Annotated[Positive | None, Mark.LENGTH] = None
    """end the run after the step at which training, without evaluation, has taken this long"""
    max_teacher_tokens: Annotated[Count | None, Mark.LENGTH] = None
    """end the run after the step at which the teacher has scored or written this many tokens"""
    steps_per_rollout_batch: Annotated[Count, Mark.BUDGET] = 1
    """optimiser steps (mini-batches) on each rollout batch"""
    learning_rate: LearningRate = 1e-6
    """learning rate of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate after the warm-up, as in transformers: linear and cosine fall to 0 after the
    last step"""
    warmup_steps: NonNegativeInt = 0
    """steps in which the learning rate rises; in the first it is 0"""
    weight_decay: NonNegative = 0.0
    """weight decay of AdamW"""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """beta1 and beta2 of AdamW"""
    max_grad_norm: Positive = 1.0
    """gradients with a larger norm are scaled down to it"""
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "sequence_mean"
    """how token losses are reduced to one loss; sequence_mean is the paper's"""
    advantage_scale: Literal["std", "none"] = "std"
    """whether advantages are divided by the group's standard deviation ("none": Dr.GRPO)"""
    kl_coef: NonNegative | AnnealedNonNegative = 0.0
    """weight of the KL leash to the initial student"""
    max_missing_teacher_share: Annotated[ShareBelowOne, Mark.NO_NUMBER] = 0.05
    """share of a rollout batch's tokens that may lack a teacher log-prob; if more are missing after
    a second request, the run stops"""
    max_skipped_steps: Annotated[Count, Mark.NO_NUMBER] = 3
    """a step whose loss or gradient is not finite is skipped; after this many in a row the run
    stops"""
    tokens_per_batch: Annotated[Count, Mark.ROUNDING] = 16_384
    """most tokens (with padding) in one forward and backward pass; changes memory, not results"""

    @property
    def num_rollout_batches(self) -> int:
        return -(-self.num_steps // self.steps_per_rollout_batch)


class EvaluationConfig(Section):
    """How the student is measured on held-out problems: validation during the run, test before and
    after it."""

    every_steps: Count = 20
    """steps between validations; a checkpoint is written at each"""
    num_validation_problems: Count = 100
    """problems at each validation"""
    num_validation_samples: Count = 1
    """completions of each validation problem"""
    num_test_problems: Count = 300
    """test problems, before and after training"""
    num_test_samples: Count = 1
    """completions of each test problem; pass@k needs k of them"""
    ood_task: dict[str, Any] = Field(default={})
    """settings of [task] that differ in the out-of-distribution test, such as { num_people = [4] };
    empty: no such test"""
    num_ood_problems: Count = 100
    """out-of-distribution test problems, before and after training"""
    temperature: NonNegative = 1.0
    """sampling temperature; 0 takes the most likely token"""


class CheckpointConfig(Section):
    """Which checkpoints are kept, and how old the newest may get. One is written at each validation
    and when a signal stops the run."""

    keep_last: Count = 2
    """number of latest validation checkpoints to keep; with only one, a damaged file costs the
    run"""
    keep_best: NonNegativeInt = 1
    """number of checkpoints with the highest validation pass@1 to keep; ties go to the earliest"""
    every_seconds: Positive = 600.0
    """also write a checkpoint between validations once the newest is this old; a killed run loses
    at most this time and one step"""


class LoggingConfig(Section):
    """Where the metrics of a run are logged besides its own directory, on any engine."""

    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """trackers to log to; each needs the extra of its name, such as `rlad[tensorboard]`"""
    project: Annotated[str, Field(min_length=1)] = "rlad"
    """name of the project in trackio and wandb"""


class RunConfig(Section):
    """One training run."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    task: Annotated[TaskConfig, Field(discriminator="type")]
    objective: Annotated[ObjectiveConfig, Field(discriminator="type")] = TRRDConfig()
    rollout: RolloutConfig = RolloutConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: Annotated[CheckpointConfig, Mark.NO_NUMBER] = CheckpointConfig()
    engine: EngineConfig = EngineConfig()
    logging: Annotated[LoggingConfig, Mark.NO_NUMBER] = LoggingConfig()
    seed: NonNegativeInt = 0
    """seed of everything that is drawn at random"""
    run_dir: Annotated[Location | None, Mark.NO_NUMBER] = None
    """where the run is stored; by default `runs/<task>-<objective>-seed<seed>`"""

    def problems(self) -> Iterator[str]:
        loop = self.optimization
        if 0 < loop.num_steps <= loop.warmup_steps:
            yield (
                f"optimization.warmup_steps = {loop.warmup_steps} leaves none of the "
                f"{loop.num_steps} steps at the full learning rate; set it below "
                "optimization.num_steps"
            )
        num_prompts = self.rollout.prompts_per_batch
        num_steps = self.optimization.steps_per_rollout_batch
        objective = self.objective
        if num_prompts % num_steps:
            yield (
                f"rollout.prompts_per_batch = {num_prompts} is not a multiple of "
                f"optimization.steps_per_rollout_batch = {num_steps}, but every optimiser step "
                "takes the same number of prompts; change one of them"
            )
        num_validations = objective.num_deciding_validations
        earliest = self.evaluation.every_steps * (num_validations or 0)
        if num_validations is not None and -(-earliest // num_steps) * num_steps >= loop.num_steps:
            yield (
                f"objective.opd_share = 'auto' ends opd after {num_validations} validations "
                "without a gain (objective.auto_patience); with evaluation.every_steps = "
                f"{self.evaluation.every_steps} that is step {earliest} at the earliest, but the "
                f"run has optimization.num_steps = {loop.num_steps}; lower auto_patience or "
                "every_steps"
            )
        if objective.is_of_old_policy and num_steps > 1:
            yield (
                f"objective {objective.type!r} estimates the divergence from the sampled token "
                "without a weight πS / πold, which is correct only for the first step on a rollout "
                "batch; set optimization.steps_per_rollout_batch = 1, or another objective.support"
            )
        if self.teacher is None and self.needs_teacher:
            yield (
                f"objective {objective.type!r} needs a teacher; add a [teacher] section with its "
                "model, or set objective=grpo"
            )
        if isinstance(self.task, EpisodesConfig) and self.rollout.max_staleness:
            yield (
                "rollout.max_staleness = 1 lets a server sample whole completions ahead, but an "
                "episode's turns wait for its environment; set it to 0"
            )
        if objective.written_by == "teacher":
            yield from _what_a_writing_teacher_rules_out(objective, self.rollout)
        if objective.needs_teacher and self.teacher is not None:
            yield from _what_the_teacher_lacks(objective, self.teacher)
        _ = self.ood_task  # whose settings may be wrong

    @property
    def digest(self) -> str:
        """A hash that is equal for configs of the same run. Paths, addresses and, unless a schedule
        depends on it, the length of the run do not enter it."""
        table = self.dump(without=(Mark.NO_NUMBER, Mark.LENGTH))
        if self.schedule_depends_on_num_steps:
            table["optimization"]["num_steps"] = self.optimization.num_steps
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()

    @property
    def schedule_depends_on_num_steps(self) -> bool:
        """Whether what a step does depends on the length of the run."""
        constant = self.optimization.schedule == "constant"
        return not constant or self.objective.schedule_depends_on_num_steps

    @property
    def needs_teacher(self) -> bool:
        return self.objective.needs_teacher

    @property
    def ood_task(self) -> TaskConfig | None:
        """The task of the out-of-distribution test; None without one."""
        changed = self.evaluation.ood_task
        return with_changes(self.task, changed) if changed else None

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.task.type}-{self.objective.type}-seed{self.seed}")


def _what_a_writing_teacher_rules_out(objective: Any, rollout: RolloutConfig) -> Iterator[str]:
    """Yield what is wrong with the sampler's settings when the teacher writes the completions."""
    if rollout.max_staleness:
        yield (
            f"rollout.max_staleness = 1 lets servers sample ahead with the student, but for "
            f"objective {objective.type!r} the teacher writes the completions; set it to 0"
        )
    if rollout.engine != "native" and rollout.vllm.sleep == "always" and not rollout.vllm.urls:
        yield (
            "rollout.vllm.sleep = 'always', but only one vLLM of a process can sleep, and "
            f"objective {objective.type!r} starts a second one for its teacher; set it to 'auto'"
        )


def _what_the_teacher_lacks(objective: Any, teacher: Any) -> Iterator[str]:
    """Yield what an objective needs and its teacher cannot provide."""
    if objective.written_by == "teacher" and not teacher.writes:
        yield (
            f"objective {objective.type!r} needs the teacher's model itself, but teacher.type is "
            f"{teacher.type!r}; use teacher.type = 'local', or another objective such as "
            "objective=opd"
        )
    wanted = objective.asked_of_teacher
    if wanted != "sampled" and any(getattr(one, "end_token", None) for one in teacher.walk()):
        yield (
            f"teacher.end_token applies only to the sampled token, but objective "
            f"{objective.type!r} compares distributions of the support {wanted!r}, which keep the "
            "student's own end token; add the token to student.end_tokens instead, or use the "
            "support 'sampled'"
        )
    if wanted not in teacher.gives:
        given = [one for one in get_args(Support) if one in teacher.gives]
        yield (
            f"objective {objective.type!r} needs probabilities of the support {wanted!r}, but this "
            f"teacher of type {teacher.type!r} gives only {' and '.join(map(repr, given))}; use a "
            "teacher in this process, such as teacher.type = 'local', or another support"
        )
