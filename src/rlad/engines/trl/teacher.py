"""Make the teacher of `RLADTrainer` from what the user passes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from rlad.engines.trl.config import RLADConfig
from rlad.errors import UserError
from rlad.models.loading import LanguageModel, load_language_model
from rlad.scoring.scorer import Scorer
from rlad.teachers import require_no_error
from rlad.teachers.base import Teacher, TeacherRequest
from rlad.teachers.compatibility import compare_tokenizers
from rlad.teachers.local import LocalTeacher, ScoringTeacher
from rlad.teachers.sharded import ShardedTeacher


def as_teacher(
    teacher: Any,
    args: RLADConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    student: Any,
) -> Teacher:
    """Make a teacher from a model or its name; a `Teacher` is returned unchanged.

    The teacher scores at the sampling temperature, with a replica on each process's device or
    (`teacher_is_sharded`) one model over all processes. The base model of a PEFT student shares the
    student's weights.

    Raises `UserError` if it cannot score this tokenizer's tokens, or changes with the student.
    """
    if problem := next(_problems(teacher, args, accelerator, student), None):
        raise UserError(problem)
    if isinstance(teacher, Teacher):
        return teacher
    scoring: dict[str, Any] = {
        "temperature": args.temperature,
        "tokens_per_batch": args.teacher_tokens_per_batch,
    }
    if _is_base_model(teacher, student):
        return BaseModelTeacher(student, _with_tokenizer(teacher, tokenizer), **scoring)
    # A model that will be sharded is built on the CPU: it need not fit on one device.
    device = torch.device("cpu") if args.teacher_is_sharded else accelerator.device
    if isinstance(teacher, str):
        loaded = load_language_model(teacher, dtype=args.teacher_dtype, device=str(device))
        require_no_error(teacher, compare_tokenizers(tokenizer, loaded.tokenizer))
    else:
        loaded = _with_tokenizer(teacher.eval().to(device), tokenizer)
    if args.teacher_is_sharded:
        return ShardedTeacher(loaded, device_type=accelerator.device.type, **scoring)
    return LocalTeacher(loaded, **scoring)


def _with_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    return LanguageModel(str(model.config.name_or_path), model, tokenizer, (), 0, model.dtype)


def _is_base_model(teacher: Any, student: Any) -> bool:
    return bool(is_peft_model(student)) and teacher is student.get_base_model()


def _problems(
    teacher: Any, args: RLADConfig, accelerator: Accelerator, student: Any
) -> Iterator[str]:
    """Yield why this cannot be the teacher, or not where the arguments place it."""
    if isinstance(teacher, Teacher):
        for does in _needs_the_native_engine(teacher):
            yield f"teacher {teacher.identity!r} {does}, which only the native engine supports."
        if args.teacher_is_sharded and not isinstance(teacher, ShardedTeacher):
            yield (
                "teacher_is_sharded is for a teacher given as a model or its name; "
                f"{teacher.identity!r} decides itself where it is."
            )
    elif _is_base_model(teacher, student):
        splitting = (DistributedType.FSDP, DistributedType.DEEPSPEED)
        what = "teacher_is_sharded" if args.teacher_is_sharded else ""
        if accelerator.distributed_type in splitting:
            what = what or accelerator.distributed_type.value
        if what:
            yield (
                f"teacher is the student's base model, whose weights {what} would shard under it; "
                "pass its name, which loads a copy."
            )
    elif teacher is student:
        yield (
            "teacher is the student itself, which changes with every step; pass its name for a "
            "frozen copy, or peft_config to train an adapter on it."
        )
    elif not isinstance(teacher, str | PreTrainedModel):
        yield (
            f"teacher is a {type(teacher).__name__}; pass a model's name, a transformers model or "
            "a Teacher."
        )
    elif args.teacher_is_sharded and accelerator.num_processes == 1:
        yield (
            "teacher_is_sharded shards the teacher over processes, but this is a single one; leave "
            "it out."
        )


def _needs_the_native_engine(teacher: Teacher) -> Iterator[str]:
    if teacher.state():
        yield "moves with the student"
    if teacher.needs_group:
        yield "is shown the group's rollouts"
    if teacher.may_be_silent:
        yield "is silent where there is nothing to show"


class BaseModelTeacher(ScoringTeacher):
    """A teacher that is the student with its adapters off. It freezes and moves nothing of the
    student."""

    def __init__(self, student: Any, base: LanguageModel, **scoring: Any):
        """Take a `PeftModel` as `student`, and in `scoring` the arguments of a `Scorer` besides the
        model."""
        super().__init__(f"{base.name} without adapter", Scorer(base, **scoring))
        self._student = student

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        # Dropout must be off while the base model scores; afterwards the student is as before.
        was_training = self._student.training
        self._student.eval()
        try:
            with use_adapter(self._student, None):
                return super().logprobs(requests)
        finally:
            self._student.train(was_training)
