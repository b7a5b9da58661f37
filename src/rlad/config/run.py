"""Every setting of a run: type, range, default, one-line meaning. Imports no torch.

A run is described by one TOML file; dotted overrides (`optimization.learning_rate=1e-5`) change
single values. Unknown keys are refused with the nearest valid name. Defaults are those of the
papers where they state one, not those of the embedded tiny models, whose run is
`rlad/embedded/run.toml`.
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
    """Train a low-rank adapter, W + alpha / rank * B A, and leave the model's own weights as they
    are. Needs `rlad[peft]`."""

    rank: Count = 16
    """of A and B"""
    alpha: Positive = 32.0
    """the adapter is scaled by alpha / rank"""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """the linear layers that get one, such as ["q_proj", "v_proj"]; "all-linear" is all but the
    output layer"""


class StudentConfig(Section):
    """The model that is trained."""

    model: Location
    """Hugging Face name, folder, `embedded/student` or `smollm2-135m`"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the forward pass; the weights that are trained and all log-probs are float32"""
    device: Annotated[str, Mark.ROUNDING] = "auto"
    """`auto` takes the GPU where there is one; else a torch device such as `cuda:0` or `cpu`"""
    gradient_checkpointing: Annotated[bool, Mark.ROUNDING] = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    end_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """end a completion too, such as ["<|im_end|>"] for a base model that is to answer as its chat
    teacher does"""
    train_vision: bool = False
    """of a student that reads pictures, train its vision tower too; by default its language part
    alone"""
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
    """What the student samples from, how much and how."""

    prompts_per_batch: Count = 32
    """prompts of one rollout batch"""
    group_size: Annotated[int, Field(strict=True, ge=2)] = 8
    """rollouts of one prompt; with one alone every advantage would be 0"""
    max_prompt_tokens: Count | None = None
    """longest prompt that is accepted; by default what the context leaves"""
    max_completion_tokens: Count = 2048
    """a completion that is longer is cut off"""
    temperature: Positive = 1.0
    """log-probs of student, teacher and reference are all divided by it"""
    prompt_format: Literal["auto", "plain", "chat"] = "auto"
    """`auto` uses the chat template where the tokenizer has one"""
    system_prompt: Annotated[str, Field(min_length=1)] | None = None
    """before each conversation that has none of its own; needs a chat template"""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """variables of the chat template, such as { enable_thinking = false }"""
    rewritten_turns: Literal["refuse", "keep"] = "refuse"
    """of several turns, where the chat template writes earlier ones otherwise than the student did
    (without thoughts): refuse, or keep them as they were written"""
    max_batch_rows: Annotated[Count, Mark.ROUNDING] = 256
    """most completions that are decoded at once"""
    cuda_graphs: Annotated[bool, Mark.ROUNDING] = False
    """decode by CUDA graphs: a step of our own decoder without the cost of launching its kernels;
    not run on a GPU so far"""
    engine: Literal["native", "vllm", "auto"] = "native"
    """what writes the completions: our own decoder, or vLLM in the same process; `auto` takes vLLM
    where it is installed and fits device and model"""
    vllm: VLLMConfig = VLLMConfig()
    correction: CorrectionConfig = CorrectionConfig()
    max_staleness: Annotated[int, Field(strict=True, ge=0, le=1)] = 0
    """1: a vLLM server writes the next rollout batch while the present one trains, with the weights
    of before its updates; `rollout.correction` weighs the difference"""

    def problems(self) -> Iterator[str]:
        if self.vllm.urls and self.engine != "vllm":
            yield (
                f"rollout.vllm.urls names servers, and rollout.engine is {self.engine!r}; set it "
                "to 'vllm', or leave the urls out"
            )
        if self.max_staleness and not self.vllm.urls:
            yield (
                "rollout.max_staleness = 1 needs a vLLM server that writes while this process "
                "trains; name it in rollout.vllm.urls with rollout.engine = 'vllm', or set it to 0"
            )

    of_method: ClassVar[frozenset[str]] = frozenset({"engine", "vllm", "correction"})
    """The settings in which methods of one comparison may differ: who writes, and what corrects
    it. All others belong to the comparison."""


class OptimizationConfig(Section):
    """From rollouts to a better student."""

    num_steps: Annotated[Count, Mark.LENGTH] = 100
    """optimiser steps of the whole run"""
    max_seconds: Annotated[Positive | None, Mark.LENGTH] = None
    """end the run earlier, after the step with which training (without evaluation) has taken so
    long"""
    max_teacher_tokens: Annotated[Count | None, Mark.LENGTH] = None
    """end the run earlier, after the step with which the teacher has scored or written so many
    tokens"""
    steps_per_rollout_batch: Annotated[Count, Mark.BUDGET] = 1
    """optimiser steps (mini-batches) on each rollout batch"""
    learning_rate: LearningRate = 1e-6
    """of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """of the learning rate after the warm-up, as in transformers: linear and cosine fall to 0
    after the last step"""
    warmup_steps: NonNegativeInt = 0
    """steps in which the learning rate rises; the first of them has 0"""
    weight_decay: NonNegative = 0.0
    """of AdamW"""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """of AdamW"""
    max_grad_norm: Positive = 1.0
    """longer gradients are shortened to it"""
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "sequence_mean"
    """how token losses become one number; sequence_mean is the paper's"""
    advantage_scale: Literal["std", "none"] = "std"
    """divide advantages by the group's standard deviation, or not (Dr.GRPO)"""
    kl_coef: NonNegative | AnnealedNonNegative = 0.0
    """weight of the KL leash to the initial student"""
    max_missing_teacher_share: Annotated[ShareBelowOne, Mark.NO_NUMBER] = 0.05
    """tokens of a rollout batch that the teacher may leave without a log-prob; beyond it, asked
    twice, the run stops"""
    max_skipped_steps: Annotated[Count, Mark.NO_NUMBER] = 3
    """a step whose loss or gradient is not finite is skipped; with so many of them in a row the run
    stops"""
    tokens_per_batch: Annotated[Count, Mark.ROUNDING] = 16_384
    """most tokens (padding included) in one forward and backward pass; changes memory, not the
    result"""

    @property
    def num_rollout_batches(self) -> int:
        return -(-self.num_steps // self.steps_per_rollout_batch)


class EvaluationConfig(Section):
    """How the student is measured on held-out problems: validation during the run, test before and
    after it."""

    every_steps: Count = 20
    """validation, and a checkpoint, every so many steps"""
    num_validation_problems: Count = 100
    """at each validation"""
    num_validation_samples: Count = 1
    """completions of each validation problem"""
    num_test_problems: Count = 300
    """before and after training"""
    num_test_samples: Count = 1
    """completions of each test problem; pass@k needs k of them"""
    ood_task: dict[str, Any] = Field(default={})
    """settings of [task] that differ in the out-of-distribution test, such as { num_people = [4] };
    empty: there is none"""
    num_ood_problems: Count = 100
    """out-of-distribution test problems, before and after training"""
    temperature: NonNegative = 1.0
    """0 takes the most likely token"""


class CheckpointConfig(Section):
    """Which checkpoints are kept, and how old the newest may get; one is written at each
    validation, and at a signal."""

    keep_last: Count = 2
    """of the checkpoints at validations the last so many; with one alone, a damaged one costs the
    run"""
    keep_best: NonNegativeInt = 1
    """and so many with the highest validation pass@1, of equals the earliest"""
    every_seconds: Positive = 600.0
    """write one between validations too when the newest is so old: what a killed run loses at most,
    but for a step"""


class LoggingConfig(Section):
    """Where the figures of a run go besides its own directory, on any engine."""

    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """any of them; each needs the extra of its name, such as `rlad[tensorboard]`"""
    project: Annotated[str, Field(min_length=1)] = "rlad"
    """of trackio and wandb"""


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
    """of everything that is drawn at random"""
    run_dir: Annotated[Location | None, Mark.NO_NUMBER] = None
    """where the run is stored; by default `runs/<task>-<objective>-seed<seed>`"""

    def problems(self) -> Iterator[str]:
        loop = self.optimization
        if 0 < loop.num_steps <= loop.warmup_steps:
            yield (
                f"optimization.warmup_steps = {loop.warmup_steps} leaves none of the "
                f"{loop.num_steps} steps at the full learning rate; give fewer warm-up steps than "
                "optimization.num_steps"
            )
        num_prompts = self.rollout.prompts_per_batch
        num_steps = self.optimization.steps_per_rollout_batch
        objective = self.objective
        if num_prompts % num_steps:
            yield (
                f"rollout.prompts_per_batch = {num_prompts} is no multiple of "
                f"optimization.steps_per_rollout_batch = {num_steps}, but every optimiser step "
                "takes the same number of prompts; change one of them"
            )
        num_validations = objective.num_deciding_validations
        earliest = self.evaluation.every_steps * (num_validations or 0)
        if num_validations is not None and -(-earliest // num_steps) * num_steps >= loop.num_steps:
            yield (
                f"objective.opd_share = 'auto' ends opd after {num_validations} validations "
                "without a gain (objective.auto_patience), at evaluation.every_steps = "
                f"{self.evaluation.every_steps} after step {earliest} at the earliest, and the run "
                f"has optimization.num_steps = {loop.num_steps}; lower one of the first two"
            )
        if objective.is_of_old_policy and num_steps > 1:
            yield (
                f"objective {objective.type!r} estimates the divergence from the sampled token "
                "without a weight πS / πold, which holds for the first step on a rollout batch "
                "alone; set optimization.steps_per_rollout_batch = 1, or another objective.support"
            )
        if self.teacher is None and self.needs_teacher:
            yield (
                f"objective {objective.type!r} needs a teacher; add a [teacher] section with its "
                "model, or set objective=grpo"
            )
        if isinstance(self.task, EpisodesConfig) and self.rollout.max_staleness:
            yield (
                "rollout.max_staleness = 1 has a server write whole completions ahead, and an "
                "episode's turns wait for its environment; set it to 0"
            )
        if objective.written_by == "teacher":
            yield from _what_a_writing_teacher_rules_out(objective, self.rollout)
        if objective.needs_teacher and self.teacher is not None:
            yield from _what_the_teacher_lacks(objective, self.teacher)
        _ = self.ood_task  # whose settings may be wrong

    @property
    def digest(self) -> str:
        """Equal for configs of the same run: it may be stored and reached elsewhere and, unless a
        schedule depends on it, be of another length."""
        table = self.dump(without=(Mark.NO_NUMBER, Mark.LENGTH))
        if self.schedule_depends_on_num_steps:
            table["optimization"]["num_steps"] = self.optimization.num_steps
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()

    @property
    def schedule_depends_on_num_steps(self) -> bool:
        """Whether the first steps would be others in a run of another length."""
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
    """Settings of the student's sampler that do not go with completions by the teacher."""
    if rollout.max_staleness:
        yield (
            f"rollout.max_staleness = 1 has servers write ahead for the student, and the teacher "
            f"writes for objective {objective.type!r}; set it to 0"
        )
    if rollout.engine != "native" and rollout.vllm.sleep == "always" and not rollout.vllm.urls:
        yield (
            "rollout.vllm.sleep = 'always', but one vLLM of a process can sleep, and objective "
            f"{objective.type!r} starts a second one for its teacher; set it to 'auto'"
        )


def _what_the_teacher_lacks(objective: Any, teacher: Any) -> Iterator[str]:
    """What an objective needs of its teacher, where that cannot give it."""
    if objective.written_by == "teacher" and not teacher.writes:
        yield (
            f"objective {objective.type!r} needs the teacher's model itself, and teacher.type is "
            f"{teacher.type!r}; use teacher.type = 'local', or another objective such as "
            "objective=opd"
        )
    wanted = objective.asked_of_teacher
    if wanted != "sampled" and any(getattr(one, "end_token", None) for one in teacher.walk()):
        yield (
            f"teacher.end_token is for the sampled token alone, and objective {objective.type!r} "
            f"compares distributions of the support {wanted!r}, in which the student's own end "
            "stays; name it in student.end_tokens instead, or take the support 'sampled'"
        )
    if wanted not in teacher.gives:
        given = [one for one in get_args(Support) if one in teacher.gives]
        yield (
            f"objective {objective.type!r} asks for the probabilities of the support {wanted!r}, "
            f"and this teacher of type {teacher.type!r} gives {' and '.join(map(repr, given))} "
            "alone; take a teacher in this process, such as teacher.type = 'local', or another "
            "support"
        )
