"""Can this teacher score this student's tokens? Asked before training."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

from rlad.config.run import RolloutConfig
from rlad.findings import Finding

THINKING_MARKERS = ("</think>", "<think>")


def compare_tokenizers(
    student: Tokenizer, teacher: Tokenizer, end_tokens: Sequence[str] = ()
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
    # A sequence is never longer than the student's context, nor than prompt and completion may be.
    allowed = student_tokens
    if rollout.max_prompt_tokens is not None:
        most = rollout.max_prompt_tokens + rollout.max_completion_tokens
        allowed = most if allowed is None else min(allowed, most)
    if teacher_tokens is None or (allowed is not None and allowed <= teacher_tokens):
        theirs = "not stated" if teacher_tokens is None else f"{teacher_tokens} tokens"
        message = f"student {student_tokens or 'not stated'}, teacher {theirs}"
        return Finding("ok", "context", message)
    room = teacher_tokens - rollout.max_completion_tokens
    advice = "lower rollout.max_completion_tokens"
    if room > 0:
        advice = f"set rollout.max_prompt_tokens to at most {room}"
    message = (
        f"its context of {teacher_tokens} tokens is shorter than prompt and completion may be "
        f"({allowed or 'no limit stated'}); {advice}."
    )
    return Finding("error", "context", message)


def _vocabulary(student: Tokenizer, teacher: Tokenizer) -> Finding:
    ours = student.get_vocab()
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    # Only the student's ids are compared: those are what the teacher is asked about.
    differing = sorted((i, token) for token, i in ours.items() if theirs.get(i) != token)
    if not differing:
        message = f"all {len(ours)} tokens of the student are the teacher's (it has {len(theirs)})"
        return Finding("ok", "vocabulary", message)
    i, token = differing[0]
    meaning = f"{theirs[i]!r} for the teacher" if i in theirs else "not in the teacher's vocabulary"
    message = (
        f"{len(differing)} of {len(ours)} token ids differ, the first is id {i}, {token!r} for the "
        f"student and {meaning}; take a teacher of the student's tokenizer family."
    )
    return Finding("error", "vocabulary", message)


def _end_token(student: Tokenizer, teacher: Tokenizer, end_tokens: Sequence[str]) -> Finding:
    ours = student.eos_token
    theirs = teacher.eos_token
    level = "ok"
    message = f"{theirs!r} for both"
    if theirs in end_tokens:
        message += f", and {ours!r} for the student"
    elif ours != theirs:
        level = "warning"
        message = (
            f"the student ends with {ours!r}, the teacher with {theirs!r}: the teacher will find "
            "the student's end token unlikely and completions grow longer; name "
            f"{theirs!r} in student.end_tokens, or let a teacher of type 'privileged' score it "
            "instead (end_token)."
        )
    return Finding(level, "end token", message)


def _chat_template(student: Tokenizer, teacher: Tokenizer) -> Finding:
    ours = student.chat_template
    theirs = teacher.chat_template
    level = "ok"
    message = "the same for both" if ours else "none for both: plain prompts"
    if ours != theirs:
        level = "warning"
        only = "student" if ours else "teacher"
        what = "differ" if ours and theirs else f"only the {only} has one"
        message = (
            f"{what}; the teacher is given the student's prompt, which is not what it was trained "
            "on: a teacher of type 'privileged' with chat_template = 'teacher' is given its own."
        )
    return Finding(level, "chat template", message)


def _thinking_markers(student: Tokenizer, teacher: Tokenizer) -> Finding:
    def known(tokenizer: Tokenizer) -> list[str]:
        places = (tokenizer.get_vocab(), str(tokenizer.chat_template))
        return [m for m in THINKING_MARKERS if any(m in place for place in places)]

    ours = known(student)
    theirs = known(teacher)
    level = "ok"
    message = f"{', '.join(ours) or 'none'} for both"
    if ours != theirs:
        level = "warning"
        message = (
            f"student {ours or 'none'}, teacher {theirs or 'none'}: one of them reasons inside "
            "markers that the other does not know."
        )
    return Finding(level, "thinking markers", message)
