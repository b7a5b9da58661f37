"""The `[teacher]` section: one class for each `type`. `cached`, `privileged` and `several` hold teachers of their own."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlad.config_types import Count, NonNegativeInt, Positive, Section, Share


class LocalTeacherConfig(Section):
    """A transformers model in this process, frozen."""

    type: Literal["local"] = "local"
    model: str
    """Hugging Face name, folder, or `embedded/teacher`"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of its weights; bfloat16 halves the memory"""
    quantization: Literal["none", "int8", "int4"] = "none"
    """of the weights of its linear layers (torchao): a quarter or an eighth of float32's memory, and another teacher"""
    device: str = "auto"
    """`auto` takes the student's device"""
    keep: Literal["gpu", "cpu"] = "gpu"
    """where its weights lie between uses; `cpu` leaves the GPU's memory to the student and costs two copies a rollout batch"""
    tokens_per_batch: Count = 16_384
    """most tokens (padding included) in one forward pass"""
    random_weights: bool = False
    """a control: the model's architecture with random weights of the run's seed, a teacher that knows nothing"""

    @property
    def title(self) -> str:
        return self.model


class AdapterTeacherConfig(Section):
    """The student's base model with another LoRA adapter, or with none: one set of weights in memory for both."""

    type: Literal["adapter"]
    adapter: str = "none"
    """folder of a PEFT adapter of the student's base model; `none` is the base model itself"""
    tokens_per_batch: Count = 16_384
    """most tokens (padding included) in one forward pass"""

    @property
    def title(self) -> str:
        return "the student's base model" if self.adapter == "none" else f"the student's base model with {self.adapter}"


class ServedTeacherConfig(Section):
    """A model behind an OpenAI-compatible `/v1/completions` that scores given token ids: vLLM, `rlad serve-teacher`."""

    type: Literal["served"]
    urls: tuple[str, ...] = Field(min_length=1)
    """such as `http://127.0.0.1:8000/v1`; several are replicas of one model: they share the work and stand in for each other"""
    model: str
    """the name under which the server offers it"""
    scoring: Literal["auto", "prompt_logprobs", "echo"] = "auto"
    """how the server is asked for log-probs of a given text; `auto` takes what passes the self-test"""
    api_key_variable: str = "RLAD_TEACHER_API_KEY"
    """environment variable with the server's key; the key itself is neither logged nor stored"""
    max_concurrent_requests: Count = 16
    """to all replicas together"""
    timeout_seconds: Positive = 120.0
    """for one request"""
    num_retries: NonNegativeInt = 5
    """of a request that failed, with growing, randomly spread pauses"""
    tolerance: Positive = 0.3
    """nats; how far a log-prob may move between generating and scoring the same text (float32 servers: 1e-3, bfloat16: 0.3)"""
    local_model: str | None = None
    """the same model as a folder or Hugging Face name: its log-probs are compared with the server's before training"""

    @property
    def title(self) -> str:
        return f"{self.model} at {self.urls[0]}"


class SeveralTeachersConfig(Section):
    """Several teachers: one for each task, or a weighted mixture of all."""

    type: Literal["several"]
    teachers: dict[str, "TeacherConfig"] = Field(min_length=1)
    """by name: the task's with `by_task`, any with `mixture`"""
    combine: Literal["by_task", "mixture"] = "by_task"
    """`mixture`: log πT = log sum_i w_i πT_i for each token, the weights scaled to sum 1"""
    weights: dict[str, Positive] = Field(default={})
    """of a mixture, by teacher; 1 for those not named"""

    @model_validator(mode="after")
    def _weights_name_teachers(self) -> "SeveralTeachersConfig":
        if unknown := sorted(set(self.weights) - set(self.teachers)):
            raise ValueError(f"weights names {unknown[0]!r}, which is none of its teachers {', '.join(self.teachers)}")
        if self.weights and self.combine != "mixture":
            raise ValueError("weights belong to combine = 'mixture'; leave them out, or set it")
        return self

    @property
    def title(self) -> str:
        return " and ".join(f"{name}: {teacher.title}" for name, teacher in self.teachers.items())


class PrivilegedTeacherConfig(Section):
    """A teacher that sees more than the student: the reference answer, a hint, a correct solution of the same group."""

    type: Literal["privileged"]
    teacher: "TeacherConfig"
    """the teacher that is shown it; with `ema` a student teaches itself"""
    template: str = "{prompt}\n\nThe correct answer is: {answer}"
    """its prompt; {prompt}, {answer}, {peer_solution}, and {name} for each entry of the problem's metadata"""

    @property
    def title(self) -> str:
        return f"{self.teacher.title}, privileged"


class CachedTeacherConfig(Section):
    """A teacher whose log-probs are kept on disk and asked for once."""

    type: Literal["cached"]
    teacher: "TeacherConfig"
    """the teacher behind the cache"""
    directory: str = "teacher_cache"
    """shared by all runs that name it, also at the same time"""
    max_gib: Positive = 10.0
    """the entries used least recently are deleted beyond it"""

    @property
    def title(self) -> str:
        return f"{self.teacher.title}, cached"


class EMATeacherConfig(Section):
    """The student's own exponential moving average: a teacher for self-distillation."""

    type: Literal["ema"]
    update_rate: Share = 0.05
    """after each step: teacher += update_rate * (student - teacher); 0 is the initial student, 1 the student itself"""
    tokens_per_batch: Count = 16_384
    """most tokens (padding included) in one forward pass"""

    @property
    def title(self) -> str:
        return {0.0: "the initial student", 1.0: "the student itself"}.get(self.update_rate, "the student's moving average")


def _local_by_default(section: Any) -> Any:
    return {"type": "local", **section} if isinstance(section, dict) else section


TeacherConfig = Annotated[
    LocalTeacherConfig
    | AdapterTeacherConfig
    | ServedTeacherConfig
    | SeveralTeachersConfig
    | PrivilegedTeacherConfig
    | CachedTeacherConfig
    | EMATeacherConfig,
    Field(discriminator="type"),
    BeforeValidator(_local_by_default),
]

for _section in (SeveralTeachersConfig, PrivilegedTeacherConfig, CachedTeacherConfig):
    _section.model_rebuild()
