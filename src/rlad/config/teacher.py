"""The `[teacher]` section: one class for each `type`. `cached`, `privileged` and `several` hold
teachers of their own."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from rlad.config.addresses import ServerURL, VariableName
from rlad.config.context import ContextConfig
from rlad.config.template import template_names
from rlad.config.types import (
    Count,
    Location,
    Mark,
    NonNegativeInt,
    Positive,
    Section,
    Share,
    Support,
)

_ALL = frozenset(get_args(Support))


class _SingleTeacher(Section):
    """A teacher that scores by itself."""

    type: Any
    gives: ClassVar[frozenset[Support]] = frozenset({"sampled"})
    """Of which tokens it gives the probabilities; one that gives all has its model in this
    process."""
    writes: ClassVar[bool] = False
    """Whether it can write completions."""
    context_of: ClassVar[Literal["model", "student", "server"]] = "student"
    """Whose longest sequence bounds the teacher's."""


class _TeacherHere(_SingleTeacher):
    """A teacher in this process."""

    gives: ClassVar[frozenset[Support]] = _ALL

    tokens_per_batch: Annotated[Count, Mark.ROUNDING] = 16_384
    """most tokens (padding included) in one forward pass"""


class LocalTeacherConfig(_TeacherHere):
    """A transformers model in this process, frozen."""

    context_of: ClassVar[Literal["model", "student", "server"]] = "model"
    writes: ClassVar[bool] = True
    type: Literal["local"] = "local"
    model: Location
    """Hugging Face name, folder, or `embedded/teacher`"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of its weights; bfloat16 halves the memory"""
    quantization: Literal["none", "int8", "int4"] = "none"
    """of the weights of its linear layers but the output layer (torchao): 8 bits or 4 (on a GPU,
    dtype bfloat16) for each"""
    device: Annotated[str, Mark.ROUNDING] = "auto"
    """`auto` takes the student's device"""
    keep: Annotated[Literal["gpu", "cpu"], Mark.NO_NUMBER] = "gpu"
    """where its weights are between uses; `cpu` leaves the GPU's memory to the student and costs
    two copies a rollout batch"""
    random_weights: bool = False
    """a control: the model's architecture with random weights of the run's seed, a teacher that
    knows nothing"""

    def problems(self) -> Iterator[str]:
        if self.quantization != "none" and self.random_weights:
            yield "random_weights are not quantised; set quantization = 'none'"
        if self.quantization == "int4" and (self.dtype != "bfloat16" or self.keep == "cpu"):
            yield (
                "quantization = 'int4' computes in bfloat16, and packs weights for the GPU, where "
                "they stay; set dtype = 'bfloat16' and keep = 'gpu', or take int8"
            )

    @property
    def title(self) -> str:
        return self.model


class AdapterTeacherConfig(_TeacherHere):
    """The student's base model with another LoRA adapter, or with none: one set of weights in
    memory for both."""

    type: Literal["adapter"]
    adapter: Location = "none"
    """folder of a PEFT adapter of the student's base model; `none` is the base model itself"""

    @property
    def title(self) -> str:
        base = "the student's base model"
        return base if self.adapter == "none" else f"{base} with {self.adapter}"


class ServedTeacherConfig(_SingleTeacher):
    """A model behind an OpenAI-compatible `/v1/completions` that scores given token ids: vLLM,
    `rlad serve-teacher`."""

    gives: ClassVar[frozenset[Support]] = _ALL - {"full"}
    context_of: ClassVar[Literal["model", "student", "server"]] = "server"
    type: Literal["served"]
    urls: Annotated[tuple[ServerURL, ...], Field(min_length=1), Mark.NO_NUMBER]
    """such as `http://127.0.0.1:8000/v1`; several are replicas of one model: they share the work
    and stand in for each other"""
    model: str
    """the name under which the server offers it"""
    scoring: Literal["auto", "prompt_logprob_token_ids", "prompt_logprobs", "echo"] = "auto"
    """how the server is asked for log-probs of a given text; `auto` takes the first that passes the
    self-test"""
    api_key_variable: Annotated[VariableName, Mark.NO_NUMBER] = "RLAD_TEACHER_API_KEY"
    """environment variable with the server's key, if it asks for one; the key itself is neither
    logged nor stored"""
    max_concurrent_requests: Annotated[Count, Mark.NO_NUMBER] = 16
    """to all replicas together"""
    timeout_seconds: Annotated[Positive, Mark.NO_NUMBER] = 120.0
    """for one request, from sending it to the end of its answer"""
    num_retries: Annotated[NonNegativeInt, Mark.NO_NUMBER] = 7
    """of a request that no replica answered; with the default pause, 3 minutes pass until it is
    given up"""
    retry_pause_seconds: Annotated[Positive, Mark.NO_NUMBER] = 2.0
    """before the first retry; doubled by each one up to a minute, and spread randomly"""
    tolerance: Annotated[Positive, Mark.NO_NUMBER] = 0.5
    """nats; how far a log-prob may move between generating and scoring the same text (float32
    servers: 1e-3, bfloat16: 0.5)"""
    local_model: Annotated[Location | None, Mark.NO_NUMBER] = None
    """the same model as a folder or Hugging Face name: its log-probs are compared with the server's
    before training"""

    def problems(self) -> Iterator[str]:
        if len(set(self.urls)) < len(self.urls):
            yield "urls names a replica twice; name each once"

    @property
    def title(self) -> str:
        """Without the address, which is nobody's business in a model card."""
        return f"{self.model} (served)"


class SeveralTeachersConfig(Section):
    """Several teachers: one for each task, or a weighted mixture of all."""

    type: Literal["several"]
    teachers: dict[str, "TeacherConfig"] = Field(min_length=1)
    """by name: the task's with `by_task`, any with `mixture`"""
    combine: Literal["by_task", "mixture"] = "by_task"
    """`mixture`: log πT = log sum_i w_i πT_i for each token, the weights scaled to sum 1: a
    probability again"""
    weights: dict[str, Positive] = Field(default={})
    """of a mixture, by teacher; 1 for those not named"""

    writes: ClassVar[bool] = False

    @property
    def gives(self) -> frozenset[Support]:
        """What all of them give; to mix them takes whole distributions, or one number each."""
        common = _ALL.intersection(*(teacher.gives for teacher in self.teachers.values()))
        can_combine = self.combine == "by_task" or "full" in common
        return common if can_combine else frozenset({"sampled"})

    def problems(self) -> Iterator[str]:
        if unknown := sorted(self.weights.keys() - self.teachers):
            yield (
                f"weights names {unknown[0]!r}, which is none of its teachers "
                f"{', '.join(self.teachers)}"
            )
        if self.weights and self.combine != "mixture":
            yield "weights belong to combine = 'mixture'; leave them out, or set it"

    @property
    def title(self) -> str:
        return " and ".join(f"{name}: {teacher.title}" for name, teacher in self.teachers.items())


class _TeacherOfTeacher(Section):
    """A teacher that asks another one."""

    type: Any
    teacher: "TeacherConfig"
    """the teacher that is asked"""

    writes: ClassVar[bool] = False

    @property
    def gives(self) -> frozenset[Support]:
        return self.teacher.gives

    @property
    def title(self) -> str:
        return f"{self.teacher.title}, {self.type}"


class PrivilegedTeacherConfig(_TeacherOfTeacher):
    """A teacher with a prompt of its own: it sees more than the student (the reference answer, a
    hint, a correct solution of the same group), or the same in another form (its own chat template,
    thinking on).
    """

    type: Literal["privileged"]
    template: str = "The correct answer to the following is: {answer}\n\n{prompt}"
    """its prompt; {prompt}, {answer}, {peer_solution}, and {name} for each entry of the problem's
    metadata"""
    context: ContextConfig | None = None
    """in place of the template: what it is shown after the question, such as other completions of
    the group"""
    chat_template: Literal["student", "teacher"] = "student"
    """whose chat template makes the conversation a text; the tokens are the student's"""
    system_prompt: Annotated[str, Field(min_length=1)] | None = None
    """in place of rollout.system_prompt"""
    chat_template_kwargs: dict[str, Any] | None = None
    """in place of rollout.chat_template_kwargs, such as { enable_thinking = true }"""
    end_token: str | None = None
    """the teacher's own, such as "<|im_end|>": scored where the student ended with its own; with a
    support of 'sampled' alone"""

    def problems(self) -> Iterator[str]:
        if "prompt" not in template_names(self.template):
            yield "its template has no {prompt}, so the teacher would not see the question; add it"
        default = type(self).model_fields["template"].default
        if self.context is not None and self.template != default:
            yield "it has a template and a context, but only one makes the prompt; leave one out"
        if any(isinstance(one, PrivilegedTeacherConfig) for one in self.teacher.walk()):
            yield "its teacher is privileged too, and would make its own prompt; write one template"
        skill = self.context and self.context.skill
        if skill and skill.summariser == "teacher" and self.teacher.type != "local":
            yield (
                f"context.skill.summariser = 'teacher' needs a teacher of type 'local', which can "
                f"write, and this one is {self.teacher.title}; take 'student', 'endpoint' or "
                "'rules'"
            )


class CachedTeacherConfig(_TeacherOfTeacher):
    """A teacher whose log-probs are kept on disk and asked for once."""

    type: Literal["cached"]
    directory: Annotated[Location, Mark.NO_NUMBER] = "teacher_cache"
    """shared by all runs that name it, also at the same time"""
    max_gib: Annotated[Positive, Mark.NO_NUMBER] = 10.0
    """beyond it nothing more is stored"""
    tolerance: Annotated[Positive, Mark.NO_NUMBER] = 0.1
    """nats a token, on average; one stored answer a run is asked for again, and one further off is
    another teacher's"""

    @property
    def gives(self) -> frozenset[Support]:
        return self.teacher.gives - {"full"}


class EMATeacherConfig(_TeacherHere):
    """The student's own exponential moving average: a teacher for self-distillation."""

    type: Literal["ema"]
    update_rate: Share = 0.05
    """after each step: teacher += update_rate * (student - teacher); 0 is the initial student, 1
    the student itself"""
    every_batches: Count | None = None
    """do that after every so many rollout batches instead; with update_rate = 1 the teacher is the
    student as it was then"""
    trust_region: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    """a of log πT = (1 - a) log π0 + a log π, normalised over the vocabulary: π0 is the initial
    student, π this average"""

    @property
    def is_student(self) -> bool:
        """Whether the student's present weights are its own."""
        return self.update_rate == 1 and self.every_batches is None

    @property
    def title(self) -> str:
        title = "the student's moving average"
        if self.update_rate == 0:
            title = "the initial student"
        elif self.is_student:
            title = "the student itself"
        elif self.update_rate == 1:
            title = f"the student, synced every {self.every_batches} rollout batches"
        if self.trust_region is None:
            return title
        return f"{title}, mixed with the initial student"


def single_teachers(teacher: Section | None, name: str = "teacher") -> Iterator[tuple[str, Any]]:
    """The sections of the teachers that score by themselves, each with what to call it."""
    if teacher is None:
        return
    if not teacher.children:
        yield name, teacher
    for key, inner in teacher.children.items():
        if isinstance(inner, ContextConfig):
            continue
        own_name = key.removeprefix("teachers.")
        yield from single_teachers(inner, name if key == "teacher" else f"{name} {own_name}")


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
