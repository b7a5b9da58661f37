"""The `[teacher]` section: one class for each `type`. `cached`, `privileged` and `several` contain
other teachers."""

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
    """The tokens whose probabilities it can give. A teacher that gives all of them has its model in
    this process."""
    writes: ClassVar[bool] = False
    """Whether it can write completions."""
    context_of: ClassVar[Literal["model", "student", "server"]] = "student"
    """Whose context length limits the teacher's sequences."""


class _TeacherHere(_SingleTeacher):
    """A teacher whose model is in this process."""

    gives: ClassVar[frozenset[Support]] = _ALL

    tokens_per_batch: Annotated[Count, Mark.ROUNDING] = 16_384
    """most tokens (with padding) in one forward pass"""


class LocalTeacherConfig(_TeacherHere):
    """A frozen transformers model in this process."""

    context_of: ClassVar[Literal["model", "student", "server"]] = "model"
    writes: ClassVar[bool] = True
    type: Literal["local"] = "local"
    model: Location
    """Hugging Face name, folder, or `embedded/teacher`"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """data type of its weights; bfloat16 halves the memory"""
    quantization: Literal["none", "int8", "int4"] = "none"
    """quantise the weights of its linear layers except the output layer (torchao): to 8 bits, or to
    4 (on a GPU, with dtype bfloat16)"""
    device: Annotated[str, Mark.ROUNDING] = "auto"
    """a torch device; `auto` uses the student's"""
    keep: Annotated[Literal["gpu", "cpu"], Mark.NO_NUMBER] = "gpu"
    """where its weights are kept between uses; `cpu` leaves the GPU's memory to the student and
    costs two copies for each rollout batch"""
    random_weights: bool = False
    """control experiment: the model's architecture with random weights from the run's seed, so that
    the teacher knows nothing"""

    def problems(self) -> Iterator[str]:
        if self.quantization != "none" and self.random_weights:
            yield "random_weights cannot be quantised; set quantization = 'none'"
        if self.quantization == "int4" and (self.dtype != "bfloat16" or self.keep == "cpu"):
            yield (
                "quantization = 'int4' computes in bfloat16, and its packed weights must stay on "
                "the GPU; set dtype = 'bfloat16' and keep = 'gpu', or use int8"
            )

    @property
    def title(self) -> str:
        return self.model


class AdapterTeacherConfig(_TeacherHere):
    """The student's base model with another LoRA adapter, or with none. Student and teacher share
    the base model's weights in memory."""

    type: Literal["adapter"]
    adapter: Location = "none"
    """folder of a PEFT adapter of the student's base model; `none` is the base model itself"""

    @property
    def title(self) -> str:
        base = "the student's base model"
        return base if self.adapter == "none" else f"{base} with {self.adapter}"


class ServedTeacherConfig(_SingleTeacher):
    """A model on a server with an OpenAI-compatible `/v1/completions` that can score given token
    ids: vLLM or `rlad serve-teacher`."""

    gives: ClassVar[frozenset[Support]] = _ALL - {"full"}
    context_of: ClassVar[Literal["model", "student", "server"]] = "server"
    type: Literal["served"]
    urls: Annotated[tuple[ServerURL, ...], Field(min_length=1), Mark.NO_NUMBER]
    """addresses such as `http://127.0.0.1:8000/v1`; several are replicas of one model, which share
    the requests and take over if one fails"""
    model: str
    """name of the model on the server"""
    scoring: Literal["auto", "prompt_logprob_token_ids", "prompt_logprobs", "echo"] = "auto"
    """which request returns the log-probs of a given text; `auto` uses the first that passes the
    self-test"""
    api_key_variable: Annotated[VariableName, Mark.NO_NUMBER] = "RLAD_TEACHER_API_KEY"
    """environment variable with the server's key, if it needs one; the key itself is neither logged
    nor stored"""
    max_concurrent_requests: Annotated[Count, Mark.NO_NUMBER] = 16
    """most requests at once, over all replicas"""
    timeout_seconds: Annotated[Positive, Mark.NO_NUMBER] = 120.0
    """limit for one request, until the end of the response"""
    num_retries: Annotated[NonNegativeInt, Mark.NO_NUMBER] = 7
    """retries of a request that every replica failed; with the default pause, it is given up after
    3 minutes"""
    retry_pause_seconds: Annotated[Positive, Mark.NO_NUMBER] = 2.0
    """pause before the first retry; doubles with each retry up to a minute, with random jitter"""
    tolerance: Annotated[Positive, Mark.NO_NUMBER] = 0.5
    """largest difference in nats between a log-prob from generating and from scoring the same text
    (float32 servers: 1e-3, bfloat16: 0.5)"""
    local_model: Annotated[Location | None, Mark.NO_NUMBER] = None
    """the same model as a folder or Hugging Face name: its log-probs are compared with the server's
    before training"""

    def problems(self) -> Iterator[str]:
        if len(set(self.urls)) < len(self.urls):
            yield "urls names a replica twice; name each once"

    @property
    def title(self) -> str:
        """The model's name without the server's address, which does not belong in a model card."""
        return f"{self.model} (served)"


class SeveralTeachersConfig(Section):
    """Several teachers: one for each task, or a weighted mixture of all."""

    type: Literal["several"]
    teachers: dict[str, "TeacherConfig"] = Field(min_length=1)
    """teachers by name: the names of tasks with `by_task`, any names with `mixture`"""
    combine: Literal["by_task", "mixture"] = "by_task"
    """one teacher for each task, or a mixture: log πT = log sum_i w_i πT_i for each token, with
    weights normalised to sum to 1"""
    weights: dict[str, Positive] = Field(default={})
    """weights of a mixture by teacher; 1 for those not named"""

    writes: ClassVar[bool] = False

    @property
    def gives(self) -> frozenset[Support]:
        """The supports that all of its teachers give. A mixture needs either whole distributions or
        the sampled token's probability."""
        common = _ALL.intersection(*(teacher.gives for teacher in self.teachers.values()))
        can_combine = self.combine == "by_task" or "full" in common
        return common if can_combine else frozenset({"sampled"})

    def problems(self) -> Iterator[str]:
        if unknown := sorted(self.weights.keys() - self.teachers):
            yield (
                f"weights names {unknown[0]!r}, which is not one of its teachers "
                f"{', '.join(self.teachers)}"
            )
        if self.weights and self.combine != "mixture":
            yield "weights need combine = 'mixture'; set it, or leave the weights out"

    @property
    def title(self) -> str:
        return " and ".join(f"{name}: {teacher.title}" for name, teacher in self.teachers.items())


class _TeacherOfTeacher(Section):
    """A teacher that forwards requests to another teacher."""

    type: Any
    teacher: "TeacherConfig"
    """the teacher that scores"""

    writes: ClassVar[bool] = False

    @property
    def gives(self) -> frozenset[Support]:
        return self.teacher.gives

    @property
    def title(self) -> str:
        return f"{self.teacher.title}, {self.type}"


class PrivilegedTeacherConfig(_TeacherOfTeacher):
    """A teacher with its own prompt. It sees more than the student (the reference answer, a hint, a
    correct solution of the same group), or the same in another form (its own chat template,
    thinking on).
    """

    type: Literal["privileged"]
    template: str = "The correct answer to the following is: {answer}\n\n{prompt}"
    """the teacher's prompt, with {prompt}, {answer}, {peer_solution}, or the {name} of any entry of
    the problem's metadata"""
    context: ContextConfig | None = None
    """instead of a template: blocks after the question, such as other completions of the group"""
    chat_template: Literal["student", "teacher"] = "student"
    """whose chat template formats the conversation; it is tokenised by the student's tokenizer"""
    system_prompt: Annotated[str, Field(min_length=1)] | None = None
    """replaces rollout.system_prompt"""
    chat_template_kwargs: dict[str, Any] | None = None
    """replaces rollout.chat_template_kwargs; such as { enable_thinking = true }"""
    end_token: str | None = None
    """the teacher's own end token, such as "<|im_end|>", which is scored where the student ended
    with its own; only with the support 'sampled'"""

    def problems(self) -> Iterator[str]:
        if "prompt" not in template_names(self.template):
            yield "its template has no {prompt}, so the teacher would not see the question; add it"
        default = type(self).model_fields["template"].default
        if self.context is not None and self.template != default:
            yield "it has a template and a context, but only one can make the prompt; remove one"
        if any(isinstance(one, PrivilegedTeacherConfig) for one in self.teacher.walk()):
            yield "its teacher is privileged too, and would make its own prompt; write one template"
        skill = self.context and self.context.skill
        if skill and skill.summariser == "teacher" and self.teacher.type != "local":
            yield (
                f"context.skill.summariser = 'teacher' needs a teacher of type 'local', which can "
                f"write, but this one is {self.teacher.title}; use 'student', 'endpoint' or "
                "'rules'"
            )


class CachedTeacherConfig(_TeacherOfTeacher):
    """A teacher whose log-probs are stored on disk, so that each is computed only once."""

    type: Literal["cached"]
    directory: Annotated[Location, Mark.NO_NUMBER] = "teacher_cache"
    """folder of the cache; several runs may share it, also at the same time"""
    max_gib: Annotated[Positive, Mark.NO_NUMBER] = 10.0
    """size limit; beyond it nothing more is stored"""
    tolerance: Annotated[Positive, Mark.NO_NUMBER] = 0.1
    """mean difference in nats per token; each run computes one stored answer again, and a larger
    difference means that it is another teacher's"""

    @property
    def gives(self) -> frozenset[Support]:
        return self.teacher.gives - {"full"}


class EMATeacherConfig(_TeacherHere):
    """The exponential moving average of the student: a teacher for self-distillation."""

    type: Literal["ema"]
    update_rate: Share = 0.05
    """after each step: teacher += update_rate * (student - teacher); 0 is the initial student, 1
    the student itself"""
    every_batches: Count | None = None
    """update after this many rollout batches instead of after each step; with update_rate = 1 the
    teacher is a copy of the student at that time"""
    trust_region: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    """a in log πT = (1 - a) log π0 + a log π, normalised over the vocabulary; π0 is the initial
    student, π the moving average"""

    @property
    def is_student(self) -> bool:
        """Whether it always has the student's current weights."""
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
    """Yield a name and the section of each teacher that scores by itself."""
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
