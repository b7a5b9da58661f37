"""The teacher beside TRL's trainer: made from what the user passes, asked for the rollouts of one process."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlad.engines.rollout_batch import missing_share
from rlad.engines.trl_config import RLADConfig
from rlad.errors import RunFailedError
from rlad.language_model import LanguageModel, load_language_model
from rlad.tasks import Problem
from rlad.teachers import Teacher, TeacherRequest
from rlad.teachers.compatibility import compare_tokenizers
from rlad.teachers.local import LocalTeacher

ProblemOf = Callable[[dict[str, Any]], Problem | None]


def as_teacher(teacher: Any, args: RLADConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Teacher:
    """A `Teacher` as it is; of a model or its name, a replica on this process's device, at the sampling temperature.

    Raises `ValueError` when it cannot score this tokenizer's tokens, or moves with the student.
    """
    if isinstance(teacher, str):
        loaded = load_language_model(teacher, dtype=args.teacher_dtype, device=str(device))
        for finding in compare_tokenizers(tokenizer, loaded.tokenizer):
            if finding.level == "error":
                raise ValueError(f"teacher {teacher!r} cannot score the student's tokens: {finding.message}")
    elif isinstance(teacher, PreTrainedModel):
        placed: Any = teacher.eval()
        loaded = LanguageModel(str(teacher.config.name_or_path), placed.to(device), tokenizer, (), 0, teacher.dtype)
    elif not isinstance(teacher, Teacher):
        raise ValueError(f"teacher is a {type(teacher).__name__}; pass a model's name, a transformers model or a Teacher.")
    else:
        if teacher.state():
            raise ValueError(f"teacher {teacher.identity!r} moves with the student, which the native engine alone offers.")
        return teacher
    return LocalTeacher(loaded, temperature=args.temperature, tokens_per_batch=args.teacher_tokens_per_batch)


def requests_for(
    batch: dict[str, Tensor], asked: Tensor, rows: Sequence[dict[str, Any]], problem_of: ProblemOf
) -> dict[int, TeacherRequest]:
    """By row, for the completions with a token in `asked` [batch, token]: the tokens as the student has them, unpadded."""
    prompts, completions = (
        [ids[mask.bool()].tolist() for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)]
        for part in ("prompt", "completion")
    )
    wanted = asked.any(dim=1).nonzero().flatten().tolist()
    return {i: TeacherRequest(prompts[i], completions[i], problem_of(rows[i])) for i in wanted}


def ask_teacher(
    teacher: Teacher, requests: dict[int, TeacherRequest], asked: Tensor, accelerator: Accelerator, *, most_missing: float
) -> Tensor:
    """Log-probs `[batch, token]`, NaN where there are none.

    Raises `RunFailedError`, on every process, when more than the share `most_missing` of the tokens in `asked` has none, also
    when asked for once more.
    """
    rows, scores = list(requests), teacher.logprobs(list(requests.values())) if requests else []
    if missing_share(scores) > most_missing:
        again = [k for k, values in enumerate(scores) if not values.isfinite().all()]
        for k, values in zip(again, teacher.logprobs([requests[rows[k]] for k in again]), strict=True):
            scores[k] = values
    result = torch.full(asked.shape, torch.nan, dtype=scores[0].dtype if scores else torch.float32)
    for i, values in zip(rows, scores, strict=True):
        result[i, : len(requests[i].completion)] = values
    result = result.to(asked.device)
    counts = accelerator.gather(torch.stack([(asked & ~result.isfinite()).sum(), asked.sum()]))
    assert isinstance(counts, Tensor)
    missing, total = counts.view(-1, 2).sum(dim=0).tolist()
    if missing > most_missing * total:
        raise RunFailedError(
            f"the teacher gave no finite log-prob for {missing / total:.1%} of the tokens, also when asked again; "
            f"max_missing_teacher_share allows {most_missing:.1%}. Check that it is the right model, answers in full, and does "
            "not overflow (dtype = bfloat16 instead of float16)."
        )
    return result
