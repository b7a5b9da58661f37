"""`rlad chat`: talk to a student, and see the teacher's log-ratio of each token."""

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import GenerationConfig, TextStreamer

from rlad.cli.evaluate import resolve_run_or_model
from rlad.cli.printing import print_line
from rlad.config.run import RunConfig
from rlad.config.validation import validated
from rlad.errors import UserError
from rlad.models.files import EMBEDDED
from rlad.models.loading import LanguageModel, load_language_model
from rlad.rollouts.prompts import is_plain, prompt_token_ids
from rlad.rollouts.texts import begun_completion, silent_tokens
from rlad.scoring.scorer import Scorer
from rlad.teachers import prepare_teacher
from rlad.teachers.base import Teacher, TeacherRequest
from rlad.text import printable

_HELP = (
    "/new starts a new conversation, /system TEXT sets the system prompt, /quit or Ctrl-D ends; "
    "Ctrl-C stops an answer"
)
_OBJECTION = 0.5
"""size of a log-ratio, in nats, beyond which a token is coloured"""
_DISLIKED = "black on dark_goldenrod"
_LIKED = "black on sea_green2"


@dataclass(slots=True)
class Chat:
    """A conversation with a student."""

    student: LanguageModel
    config: RunConfig
    temperature: float
    teacher: Teacher | None = None
    messages: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether the model has no chat template, so that each question is a separate prompt."""
        return is_plain(self.student.tokenizer, self.config.rollout.prompt_format)

    def prompt(self, question: str) -> list[int]:
        """Return the prompt's token ids: the conversation so far and the question."""
        self.messages.append(("user", question))
        asked = f"{question}\n" if self.is_plain else tuple(self.messages)
        student = self.student
        return list(
            prompt_token_ids(student.tokenizer, asked, self.config.rollout, vision=student.vision)
        )

    def answer(self, question: str, show: Callable[[str], None]) -> tuple[list[int], list[int]]:
        """Stream an answer to `show`, and return the token ids of prompt and answer. Ctrl-C stops
        the answer and keeps what is written."""
        prompt = self.prompt(question)
        most = self._room(prompt)
        written = _Pieces(self.student.tokenizer, show)
        if (begun := begun_completion(self.student.tokenizer, prompt)).strip() == "<think>":
            written.on_finalized_text(begun)  # the template has begun the answer with a thought
        settings = GenerationConfig(
            max_new_tokens=most,
            do_sample=self.temperature > 0,
            temperature=self.temperature or 1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=list(self.student.eos_token_ids),
            pad_token_id=self.student.pad_token_id,
        )
        model: Any = self.student.model
        ids = torch.tensor([prompt], device=model.device)
        with contextlib.suppress(KeyboardInterrupt), torch.no_grad(), self.student.autocast():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=written,
            )
        written.end()
        self.messages.append(("assistant", written.text))
        return prompt, written.ids

    def _room(self, prompt: Sequence[int]) -> int:
        most = self.config.rollout.max_completion_tokens
        context = self.student.context_tokens
        if context is not None:
            most = min(most, context - len(prompt))
        if most < 1:
            self.messages.pop()
            raise UserError(
                f"the conversation has {len(prompt)} tokens, but the model's context is {context}; "
                "/new starts a new one."
            )
        return most

    def log_ratios(self, prompt: list[int], answer: list[int]) -> list[float]:
        """Return log student - log teacher of each token of an answer; NaN where the teacher has no
        log-prob."""
        assert self.teacher is not None
        request = TeacherRequest(prompt, answer)
        if not self.teacher.speaks(request):
            return [math.nan] * len(answer)
        scorer = Scorer(
            self.student,
            temperature=self.config.rollout.temperature,
            tokens_per_batch=self.config.optimization.tokens_per_batch,
        )
        (ours,) = scorer.score([prompt], [answer])
        (theirs,) = self.teacher.logprobs([request])
        return (ours - theirs).tolist()


class _Pieces(TextStreamer):
    """A streamer that passes on each finished piece of text, and collects the token ids."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)
        self.ids: list[int] = []
        self.text = ""
        self._show = show
        self._silent = silent_tokens(tokenizer)
        self._has_prompt = False

    def put(self, value: Any) -> None:
        if self._has_prompt:
            ids = value.reshape(-1).tolist()
            self.ids += ids
            # As verifiers read it: a `<think>` that is a special token is part of the text.
            value = torch.tensor([one for one in ids if one not in self._silent])
        self._has_prompt = True
        if value.numel():
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._show(printable(text))


def run_chat(
    run_or_model: str,
    *,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    with_teacher: bool,
    teacher_model: str | None,
    seed: int | None,
) -> None:
    """Talk until the user ends the conversation. In a pipe, all of the input is one question."""
    console = Console(highlight=False)
    with Console(stderr=True).status("loading the model"):
        chat, model = _open(run_or_model, system, max_tokens, with_teacher, teacher_model)
        chat.temperature = chat.config.rollout.temperature if temperature is None else temperature
    if seed is not None:
        torch.manual_seed(seed)
    with contextlib.ExitStack() as held:
        if chat.teacher is not None:
            held.enter_context(closing(chat.teacher))
        if sys.stdin.isatty():
            _introduce(console, chat, model)
            _talk(console, chat)
        elif question := sys.stdin.read().strip():
            _turn(console, chat, question)
        else:
            raise UserError("standard input is empty; give it a question, or run in a terminal.")


def _open(
    run_or_model: str,
    system: str | None,
    max_tokens: int | None,
    with_teacher: bool,
    teacher_model: str | None,
) -> tuple[Chat, str]:
    config, model = resolve_run_or_model(run_or_model)
    rollout: dict[str, Any] = {}
    if system is not None:
        rollout["system_prompt"] = system
    if max_tokens is not None:
        rollout["max_completion_tokens"] = max_tokens
    changes: dict[str, Any] = {"rollout": config.rollout.model_copy(update=rollout)}
    table = config.model_dump(mode="json", exclude_none=True)
    if teacher_model is not None:
        table["teacher"] = {"type": "local", "model": teacher_model}
    if with_teacher or teacher_model is not None:
        if "teacher" not in table:
            raise UserError(
                f"{run_or_model} has no teacher; give one by --teacher-model, as a folder or a "
                "Hugging Face name."
            )
        # The run's own objective may have no teacher.
        table["objective"] = {"type": "trrd"}
        # The student of a run keeps its base model, which its teacher may share.
        if model in EMBEDDED:
            table["student"]["model"] = model
        config = validated(RunConfig, table)
    config = config.model_copy(update=changes)
    settings = config.student
    student = load_language_model(
        model, dtype=settings.dtype, device=settings.device, end_tokens=settings.end_tokens
    )
    asks = with_teacher or teacher_model is not None
    teacher = prepare_teacher(config, student) if asks else None
    chat = Chat(student, config, 1.0, teacher)
    if chat.is_plain and system is not None:
        raise UserError(
            f"{run_or_model} has no chat template, so it cannot have a --system prompt; leave it "
            "out."
        )
    return chat, model


def _introduce(console: Console, chat: Chat, model: str) -> None:
    print_line(console, model, "bold")
    print_line(console, _HELP, "dim")
    if chat.is_plain:
        note = "This model has no chat template: each text is a separate prompt, as in training."
        print_line(console, note, "dim")
    if chat.teacher is not None:
        _print_legend(console)


def _talk(console: Console, chat: Chat) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # makes lines editable, with a history

    while True:
        try:
            question = console.input("\nyou> ", markup=False).strip()
        except (EOFError, KeyboardInterrupt):
            print_line(console, "")
            return
        if question in ("/quit", "/exit"):
            return
        if question == "/new":
            chat.messages.clear()
            print_line(console, "new conversation", "dim")
        elif question.startswith("/system"):
            _set_system(console, chat, question.removeprefix("/system").strip())
        elif question.startswith("/"):
            print_line(console, _HELP, "dim")
        elif question:
            _try_turn(console, chat, question)


def _try_turn(console: Console, chat: Chat, question: str) -> None:
    """Answer a question. A user's mistake or Ctrl-C does not end the conversation."""
    num_before = len(chat.messages)
    try:
        _turn(console, chat, question)
    except KeyboardInterrupt:  # before the first token, or while the teacher scores
        if len(chat.messages) == num_before + 1:
            chat.messages.pop()  # a question without an answer
        print_line(console, "stopped", "dim")
    except UserError as error:
        print_line(console, str(error), "yellow")


def _set_system(console: Console, chat: Chat, text: str) -> None:
    if chat.is_plain:
        print_line(console, "this model has no chat template for a system prompt", "yellow")
        return
    rollout = chat.config.rollout.model_copy(update={"system_prompt": text or None})
    chat.config = chat.config.model_copy(update={"rollout": rollout})
    chat.messages.clear()
    print_line(console, "system prompt set; new conversation", "dim")


def _turn(console: Console, chat: Chat, question: str) -> None:
    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    prompt, answer = chat.answer(question, show)
    print_line(console, "")
    if chat.teacher is not None and answer:
        _print_opinion(console, chat, answer, chat.log_ratios(prompt, answer))


def _print_legend(console: Console) -> None:
    legend = Text("The teacher's view: ", style="dim")
    legend.append("less likely by the teacher", _DISLIKED)
    legend.append(" ")
    legend.append("more likely by the teacher", _LIKED)
    legend.append(f" than by the student (by more than {_OBJECTION} nats)")
    console.print(legend)


def _print_opinion(
    console: Console, chat: Chat, answer: Sequence[int], ratios: Sequence[float]
) -> None:
    """Print the answer again, coloured by log student - log teacher, and the token with the largest
    one. Without colours, such tokens are in brackets."""
    finite = {i: ratio for i, ratio in enumerate(ratios) if math.isfinite(ratio)}
    if not finite:
        print_line(console, "the teacher has no log-probs for this answer", "dim")
        return
    tokens = [printable(str(chat.student.tokenizer.decode([one]))) for one in answer]
    console.print()
    if not console.is_terminal:
        print_line(console, "teacher's view ([-]: less likely by the teacher, [+]: more likely):")
    text = opinion_text(tokens, ratios, with_marks=console.color_system is None)
    console.print(text, soft_wrap=True)
    most = max(finite, key=lambda i: abs(finite[i]))
    mean = sum(finite.values()) / len(finite)
    print_line(
        console,
        f"log student - log teacher: mean {mean:+.3f}, largest {finite[most]:+.2f} at token "
        f"{most + 1} {tokens[most]!r}",
        "dim",
    )


def opinion_text(tokens: Sequence[str], ratios: Sequence[float], *, with_marks: bool) -> Text:
    """Colour each token whose log student - log teacher is beyond the limit, above or below."""
    text = Text()
    for token, ratio in zip(tokens, ratios, strict=True):
        style, mark = "", ""
        if ratio > _OBJECTION:
            style, mark = _DISLIKED, "-"
        elif ratio < -_OBJECTION:
            style, mark = _LIKED, "+"
        text.append(f"[{mark}{token}]" if with_marks and mark else token, style)
    return text
