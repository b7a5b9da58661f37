"""The teacher beside TRL's trainer: made from what the user passes, asked for the rollouts of one
process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from rlad.engines.trl.config import RLADConfig
from rlad.engines.trl.sharded_teacher import ShardedTeacher
from rlad.errors import RunFailedError, UserError
from rlad.models.loading import LanguageModel, load_language_model
from rlad.scoring.scorer import Scorer
from rlad.tasks import Problem
from rlad.teachers.base import Teacher, TeacherRequest, missing_share
from rlad.teachers.compatibility import compare_tokenizers
from rlad.teachers.local import LocalTeacher, score_known_tokens

ProblemOf = Callable[[dict[str, Any]], Problem | None]


def as_teacher(
    teacher: Any,
    args: RLADConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    student: Any,
) -> Teacher:
    """A `Teacher` as it is; of a model or its name, one that scores at the sampling temperature: a
    replica on each process's device, or (`teacher_is_sharded`) one over all processes. The base
    model of a PEFT student shares its weights with it.

    Raises `UserError` when it cannot score this tokenizer's tokens, or moves with the student.
    """
    scoring: dict[str, Any] = {
        "temperature": args.temperature,
        "tokens_per_batch": args.teacher_tokens_per_batch,
    }
    device = torch.device("cpu") if args.teacher_is_sharded else accelerator.device
    if isinstance(teacher, Teacher):
        _require_own_placement(teacher, args)
        return teacher
    if is_peft_model(student) and teacher is student.get_base_model():
        _require_shareable(args, accelerator)
        return BaseModelTeacher(student, tokenizer, **scoring)
    if teacher is student:
        raise UserError(
            "teacher is the student itself, which moves with every step; pass its name for a "
            "frozen copy, or peft_config to "
            "train an adapter on it."
        )
    if isinstance(teacher, str):
        loaded = load_language_model(teacher, dtype=args.teacher_dtype, device=str(device))
        for finding in compare_tokenizers(tokenizer, loaded.tokenizer):
            if finding.level == "error":
                raise UserError(
                    f"teacher {teacher!r} cannot score the student's tokens: {finding.message}"
                )
    elif isinstance(teacher, PreTrainedModel):
        placed: Any = teacher.eval()
        loaded = LanguageModel(
            str(teacher.config.name_or_path), placed.to(device), tokenizer, (), 0, teacher.dtype
        )
    else:
        raise UserError(
            f"teacher is a {type(teacher).__name__}; pass a model's name, a transformers model or "
            "a Teacher."
        )
    if not args.teacher_is_sharded:
        return LocalTeacher(loaded, **scoring)
    if accelerator.num_processes == 1:
        raise UserError(
            "teacher_is_sharded splits the teacher over processes, and this is one alone; leave it "
            "out."
        )
    return ShardedTeacher(loaded, device_type=accelerator.device.type, **scoring)


def _require_own_placement(teacher: Teacher, args: RLADConfig) -> None:
    if teacher.state():
        raise UserError(
            f"teacher {teacher.identity!r} moves with the student, which the native engine alone "
            "offers."
        )
    if args.teacher_is_sharded and not isinstance(teacher, ShardedTeacher):
        raise UserError(
            "teacher_is_sharded is for a teacher given as a model or its name; "
            f"{teacher.identity!r} says itself where it is."
        )


def _require_shareable(args: RLADConfig, accelerator: Accelerator) -> None:
    splits = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if splits or args.teacher_is_sharded:
        what = (
            "teacher_is_sharded" if args.teacher_is_sharded else accelerator.distributed_type.value
        )
        raise UserError(
            f"teacher is the student's base model, whose weights {what} would split under it; pass "
            "its name, which loads "
            "a copy."
        )


def requests_for(
    batch: dict[str, Tensor], asked: Tensor, rows: Sequence[dict[str, Any]], problem_of: ProblemOf
) -> dict[int, TeacherRequest]:
    """By row, for the completions with a token in `asked` [batch, token]: the tokens as the student
    has them, unpadded."""
    prompts, completions = (
        [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)
        ]
        for part in ("prompt", "completion")
    )
    wanted = asked.any(dim=1).nonzero().flatten().tolist()
    return {i: TeacherRequest(prompts[i], completions[i], problem_of(rows[i])) for i in wanted}


def _scores(teacher: Teacher, requests: list[TeacherRequest], most_missing: float) -> list[Tensor]:
    """The teacher's answers to this process; what lacks too many tokens is asked for once more."""
    every_process_asks = isinstance(
        teacher, ShardedTeacher
    )  # and asking again would change nothing
    scores = teacher.logprobs(requests) if requests or every_process_asks else []
    if missing_share(scores) > most_missing and not every_process_asks:
        again = [k for k, values in enumerate(scores) if not values.isfinite().all()]
        for k, values in zip(again, teacher.logprobs([requests[k] for k in again]), strict=True):
            scores[k] = values
    return scores


def ask_teacher(
    teacher: Teacher,
    requests: dict[int, TeacherRequest],
    asked: Tensor,
    accelerator: Accelerator,
    *,
    most_missing: float,
) -> Tensor:
    """Log-probs `[batch, token]`, NaN where there are none.

    Raises `RunFailedError`, on every process, when more than the share `most_missing` of the tokens
    in `asked` has none, also when asked for once more.
    """
    rows = list(requests)
    scores = _scores(teacher, list(requests.values()), most_missing)
    result = torch.full(asked.shape, torch.nan, dtype=scores[0].dtype if scores else torch.float32)
    for i, values in zip(rows, scores, strict=True):
        result[i, : len(requests[i].completion)] = values
    result = result.to(asked.device)
    counts = accelerator.gather(torch.stack([(asked & ~result.isfinite()).sum(), asked.sum()]))
    assert isinstance(counts, Tensor)
    missing, total = counts.view(-1, 2).sum(dim=0).tolist()
    if missing > most_missing * total:
        raise RunFailedError(
            f"the teacher gave no finite log-prob for {missing / total:.1%} of the tokens, also "
            "when asked again; "
            f"max_missing_teacher_share allows {most_missing:.1%}. Check that it is the right "
            "model, answers in full, and does "
            "not overflow (dtype = bfloat16 instead of float16)."
        )
    return result


class BaseModelTeacher(Teacher):
    """Scores with the student's adapters switched off; nothing of the student is frozen or moved by
    it."""

    def __init__(self, student: Any, tokenizer: PreTrainedTokenizerBase, **scoring: Any):
        """`student` is a `PeftModel`; `scoring` is what a `Scorer` takes beside the model."""
        base = student.get_base_model()
        language_model = LanguageModel(
            str(base.config.name_or_path), base, tokenizer, (), 0, base.dtype
        )
        self.identity = f"{language_model.name} without adapter"
        self._student, self._vocabulary = student, language_model.vocabulary
        self._scorer = Scorer(language_model, **scoring)

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        was_training = self._student.training
        self._student.eval()
        try:
            with use_adapter(self._student, None):
                return score_known_tokens(self._scorer, self._vocabulary, requests)
        finally:
            self._student.train(was_training)
