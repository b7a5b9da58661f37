"""Can this teacher score this student's tokens? Asked before training."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlad.config.run import RolloutConfig
from rlad.findings import Finding

THINKING_MARKERS = ("<think>", "</think>")


def compare_tokenizers(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    end_tokens: Sequence[str] = (),
) -> list[Finding]:
    """Vocabulary, end token, chat template and thinking markers of student and teacher.

    The vocabulary is compared by token *strings*: each id of the student must be the same string
    for the teacher. Sizes do not matter, so vocabularies padded to different sizes are accepted and
    different ones of equal size are not. `end_tokens` end the student's completions too.
    """
    return [
        _vocabulary(student, teacher),
        _end_token(student, teacher, end_tokens),
        _chat_template(student, teacher),
        _thinking_markers(student, teacher),
    ]


def compare_contexts(
    rollout: RolloutConfig, student_tokens: int | None, teacher_tokens: int | None
) -> Finding:
    """Whether the longest sequence that this run can make fits into the teacher's context (None:
    not stated)."""
    if teacher_tokens is None:
        return Finding(
            "ok", "context", f"student {student_tokens or 'not stated'}, teacher not stated"
        )
    longest = student_tokens
    if rollout.max_prompt_tokens is not None:
        allowed = rollout.max_prompt_tokens + rollout.max_completion_tokens
        longest = allowed if longest is None else min(longest, allowed)
    if longest is not None and longest <= teacher_tokens:
        return Finding(
            "ok",
            "context",
            f"student {student_tokens or 'not stated'}, teacher {teacher_tokens} tokens",
        )
    room = teacher_tokens - rollout.max_completion_tokens
    what = (
        f"set rollout.max_prompt_tokens to at most {room}"
        if room > 0
        else "lower rollout.max_completion_tokens"
    )
    return Finding(
        "error",
        "context",
        f"its context of {teacher_tokens} tokens is shorter than prompt and completion may be "
        f"({longest or 'no limit stated'}); {what}.",
    )


def _vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Finding:
    ours, theirs = student.get_vocab(), {i: token for token, i in teacher.get_vocab().items()}
    differing = sorted(
        (i, token, theirs.get(i)) for token, i in ours.items() if theirs.get(i) != token
    )
    if not differing:
        return Finding(
            "ok",
            "vocabulary",
            f"all {len(ours)} tokens of the student are the teacher's (it has {len(theirs)})",
        )
    i, token, other = differing[0]
    meaning = "not in the teacher's vocabulary" if other is None else f"{other!r} for the teacher"
    return Finding(
        "error",
        "vocabulary",
        f"{len(differing)} of {len(ours)} token ids differ, the first is id {i}, {token!r} for the "
        f"student and {meaning}; "
        "TRRD needs a teacher of the student's tokenizer family.",
    )


def _end_token(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, end_tokens: Sequence[str]
) -> Finding:
    if teacher.eos_token in end_tokens:
        return Finding(
            "ok",
            "end token",
            f"{teacher.eos_token!r} for both, and {student.eos_token!r} for the student",
        )
    if student.eos_token == teacher.eos_token:
        return Finding("ok", "end token", f"{student.eos_token!r} for both")
    return Finding(
        "warning",
        "end token",
        f"the student ends with {student.eos_token!r}, the teacher with {teacher.eos_token!r}: the "
        "teacher will find the "
        f"student's end token unlikely and completions grow longer; name {teacher.eos_token!r} in "
        "student.end_tokens, or let a "
        "teacher of type 'privileged' score it instead (end_token).",
    )


def _chat_template(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Finding:
    ours, theirs = student.chat_template, teacher.chat_template
    if ours == theirs:
        return Finding(
            "ok", "chat template", "the same for both" if ours else "none for both: plain prompts"
        )
    what = "differ" if ours and theirs else f"only the {'student' if ours else 'teacher'} has one"
    return Finding(
        "warning",
        "chat template",
        f"{what}; the teacher is given the student's prompt, which is not what it was trained on: "
        "a teacher of type "
        "'privileged' with chat_template = 'teacher' is given its own.",
    )


def _thinking_markers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> Finding:
    def known(tokenizer: PreTrainedTokenizerBase) -> set[str]:
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        return {m for m in THINKING_MARKERS if m in tokenizer.get_vocab() or m in template}

    ours, theirs = known(student), known(teacher)
    if ours == theirs:
        return Finding("ok", "thinking markers", f"{', '.join(sorted(ours)) or 'none'} for both")
    return Finding(
        "warning",
        "thinking markers",
        f"student {sorted(ours) or 'none'}, teacher {sorted(theirs) or 'none'}: one of them "
        "reasons inside markers that the "
        "other does not know.",
    )
