"""Check before training whether a teacher can score the student's tokens."""

import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

from rlad.config.run import RolloutConfig
from rlad.findings import Finding
from rlad.models.pictures import Picture
from rlad.models.vision import Vision

THINKING_MARKERS = ("</think>", "<think>")


def compare_tokenizers(
    student: Tokenizer, teacher: Tokenizer, end_tokens: Sequence[str] = ()
) -> list[Finding]:
    """Compare vocabulary, end token, chat template and thinking markers of student and teacher.

    The vocabulary is compared by token *strings*: each id of the student must be the same string
    for the teacher. Sizes do not matter: vocabularies padded to different sizes are accepted,
    different vocabularies of equal size are not. `end_tokens` also end the student's completions.
    """
    ours = student.eos_token
    theirs = teacher.eos_token
    only = "student" if student.chat_template else "teacher"
    both_have = student.chat_template and teacher.chat_template
    marks = _thinking_markers(student)
    their_marks = _thinking_markers(teacher)
    return [
        _vocabulary(student, teacher),
        _compared(
            "end token",
            ours == theirs or theirs in end_tokens,
            common=repr(theirs),
            otherwise=f"the student ends with {ours!r}, the teacher with {theirs!r}: the teacher "
            "will find the student's end token unlikely, and completions will grow longer; add "
            f"{theirs!r} to student.end_tokens, or let a teacher of type 'privileged' score it "
            "instead (end_token).",
        ),
        _compared(
            "chat template",
            student.chat_template == teacher.chat_template,
            common="the same" if both_have else "none",
            otherwise=f"{'differ' if both_have else f'only the {only} has one'}; the teacher is "
            "given the student's prompt, which is not the form that it was trained on: a teacher "
            "of type 'privileged' with chat_template = 'teacher' gets its own.",
        ),
        _compared(
            "thinking markers",
            marks == their_marks,
            common=", ".join(marks) or "none",
            otherwise=f"student {marks or 'none'}, teacher {their_marks or 'none'}: one of them "
            "reasons inside markers that the other does not know.",
        ),
    ]


def _compared(subject: str, is_same: bool, *, common: str, otherwise: str) -> Finding:
    """Report what both have in common, or a warning."""
    if is_same:
        return Finding("ok", subject, f"{common} for both")
    return Finding("warning", subject, otherwise)


def _thinking_markers(tokenizer: Tokenizer) -> list[str]:
    places = (tokenizer.get_vocab(), str(tokenizer.chat_template))
    return [marker for marker in THINKING_MARKERS if any(marker in place for place in places)]


def compare_contexts(
    rollout: RolloutConfig,
    student_tokens: int | None,
    teacher_tokens: int | None,
    *,
    has_turns: bool = False,
) -> Finding:
    """Check whether the longest sequence of this run fits into the teacher's context (None: not
    stated). `has_turns`: it is an episode, of which an environment writes a part."""
    # A sequence is never longer than the student's context, nor than prompt and completion may be.
    allowed = student_tokens
    if rollout.max_prompt_tokens is not None:
        most = rollout.max_prompt_tokens + rollout.max_completion_tokens
        allowed = most if allowed is None else min(allowed, most)
    if teacher_tokens is None or (allowed is not None and allowed <= teacher_tokens):
        theirs = "not stated" if teacher_tokens is None else f"{teacher_tokens} tokens"
        message = f"student {student_tokens or 'not stated'}, teacher {theirs}"
        may_exceed = student_tokens is None or student_tokens > (teacher_tokens or math.inf)
        if has_turns and teacher_tokens is not None and may_exceed:
            # What an environment writes is limited only by the student's context.
            message += (
                ": an episode with its replies may be longer than the teacher's, which then scores "
                "it badly or not at all; keep episodes short (task.max_turns), or use a teacher "
                "with a longer context"
            )
            return Finding("warning", "context", message)
        return Finding("ok", "context", message)
    room = teacher_tokens - rollout.max_completion_tokens
    advice = "lower rollout.max_completion_tokens"
    if room > 0:
        advice = f"set rollout.max_prompt_tokens to at most {room}"
    message = (
        f"its context of {teacher_tokens} tokens is shorter than prompt and completion may become "
        f"({allowed or 'no limit stated'}); {advice}."
    )
    return Finding("error", "context", message)


_PROBED_SIZES = ((64, 64), (200, 100), (96, 300))
"""width and height of pictures"""


def compare_eyes(student: Vision | None, teacher: Vision | None) -> list[Finding]:
    """Check whether both make the same number of tokens from a picture. Otherwise pictures and
    completion would have other positions for the teacher."""
    if student is None:
        return []
    if teacher is None:
        message = "it reads only text, but the student also pictures: for problems without any"
        return [Finding("warning", "pictures", message)]
    if not (student.has_processor and teacher.has_processor):
        return [Finding("warning", "pictures", "no processor: for problems without any")]
    from PIL import Image

    counts = []
    for size in _PROBED_SIZES:
        picture = Picture.from_pil(Image.new("RGB", size, (127, 30, 200)), f"{size} pixels")
        ours = student.num_tokens(picture)
        theirs = teacher.num_tokens(picture)
        counts.append(ours)
        if ours != theirs:
            message = (
                f"a picture of {size[0]} x {size[1]} pixels has {ours} tokens for the student and "
                f"{theirs} for the teacher; use a teacher with the student's picture grid."
            )
            return [Finding("error", "pictures", message)]
    return [Finding("ok", "pictures", f"{min(counts)} to {max(counts)} tokens for both")]


def _vocabulary(student: Tokenizer, teacher: Tokenizer) -> Finding:
    ours = student.get_vocab()
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    # Only the student's ids are compared, since the teacher scores only those.
    differing = sorted((i, token) for token, i in ours.items() if theirs.get(i) != token)
    if not differing:
        message = f"all {len(ours)} tokens of the student are the teacher's (it has {len(theirs)})"
        return Finding("ok", "vocabulary", message)
    i, token = differing[0]
    meaning = f"{theirs[i]!r} for the teacher" if i in theirs else "not in the teacher's vocabulary"
    message = (
        f"{len(differing)} of {len(ours)} token ids differ, the first is id {i}, {token!r} for the "
        f"student and {meaning}; use a teacher of the student's tokenizer family."
    )
    return Finding("error", "vocabulary", message)
