"""A teacher with its own prompt, made from a template; the completion's token ids do not change.

    log πT(y_t | template(prompt, answer, peer solution, ...), y_<t)

The prompt is a filled template, or the question with blocks after it (`contexts.py`). If something
in the template is missing or empty for a completion (such as when no other rollout of its group was
correct), the teacher gets the student's prompt in the teacher's form. With blocks, the settings of
the context decide.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from rlad.config.context import ContextConfig, SkillEndpointConfig
from rlad.config.teacher import (
    AdapterTeacherConfig,
    CachedTeacherConfig,
    LocalTeacherConfig,
    PrivilegedTeacherConfig,
    ServedTeacherConfig,
    single_teachers,
)
from rlad.config.template import fill_template, template_names
from rlad.config.types import Mark
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.files import has_tokenizer
from rlad.models.pictures import Picture, without_markers
from rlad.models.without_weights import context_tokens, load_model_config, load_tokenizer, token_id
from rlad.rollouts.prompts import (
    Prompt,
    chat_messages,
    chat_text,
    in_place_of_question,
    prompt_token_ids,
)
from rlad.rollouts.texts import text_without_thoughts
from rlad.scoring.columns import TokenColumns
from rlad.scoring.distributions import TokenDistributions
from rlad.tasks import Problem, Verdict
from rlad.teachers import build_teacher
from rlad.teachers.base import Answer, Setting, Teacher, TeacherRequest, TeacherWrapper
from rlad.teachers.contexts import (
    BlockContext,
    Encode,
    Fitted,
    encoded,
    metadata_texts,
)
from rlad.teachers.served.teacher import scored_context

FORM = {"chat_template", "system_prompt", "chat_template_kwargs", "end_token"}
"""The settings besides the template that change the prompts or the end token."""


class PrivilegedTeacher(TeacherWrapper):
    """A wrapper whose inner teacher scores the same completions after another prompt. The result is
    NaN if both do not fit into `context`."""

    share_metric = "teacher/privileged/frac"

    def __init__(
        self,
        teacher: Teacher,
        template: str,
        *,
        encode: Encode,
        context: int | None,
        form: str = "",
        ends: Mapping[int, int] | None = None,
        blocks: BlockContext | None = None,
    ):
        """Wrap a teacher. `encode` returns the token ids of a prompt and its pictures. `context` is
        the teacher's, in tokens; None if not stated. `form` names how its prompts differ from the
        student's besides the template; empty if they do not. `ends` maps the student's end tokens
        to the teacher's. `blocks` makes the prompts instead of the template.
        """
        super().__init__(teacher)
        # The identity names everything that the prompts depend on, since other prompts make another
        # teacher.
        self.identity = f"{teacher.identity}, privileged by {template!r}"
        if blocks is not None:
            # A server's address may change without changing its answers.
            elsewhere = {"skill": {"endpoint": set(SkillEndpointConfig.keys_with(Mark.NO_NUMBER))}}
            settings = blocks.settings.model_dump(
                mode="json", exclude_defaults=True, exclude=elsewhere
            )
            self.identity = f"{teacher.identity}, privileged by {json.dumps(settings)}"
        if form:
            self.identity += f" in the form {form}"
        self.template = template
        self.context = context
        self._encode = lru_cache(maxsize=1024)(encode)
        self._has_own_form = bool(form)
        self._ends = ends or {}
        self._blocks = blocks
        self._counts: Counter[str] = Counter()
        """Counts of what was shown since the metrics were last read."""

    @property
    def needs_group(self) -> bool:
        if self._blocks is not None:
            return self._blocks.settings.needs_group
        return "peer_solution" in template_names(self.template)

    @property
    def may_be_silent(self) -> bool:
        return self._blocks is not None and self._blocks.settings.without_success != "plain"

    @property
    def shows_skills(self) -> bool:
        """Whether it is shown skills from the run's bank."""
        return self._blocks is not None and self._blocks.settings.skill is not None

    def speaks(self, request: TeacherRequest) -> bool:
        is_silent = self.may_be_silent and self.fitted(request) is None
        return not is_silent and super().speaks(request)

    def fitted(self, request: TeacherRequest) -> Fitted | None:
        """Return the context's blocks for a completion; None if there are none, or no context."""
        return self._blocks and self._blocks.fitted(request, self._room(request))

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        # The inner teacher gets only requests that fit into its context; its answers are put back
        # at the positions of those requests.
        shown = [self._show(request) for request in requests]
        answers = iter(self.teacher.submit([request for request in shown if request is not None]))
        return [
            Answer.missing(request) if other is None else next(answers)
            for request, other in zip(requests, shown, strict=True)
        ]

    def distributions(self, requests: Sequence[TeacherRequest]) -> TokenDistributions:
        return self._asked_where_it_fits(requests, lambda one, _: self.teacher.distributions(one))

    def columns(
        self, requests: Sequence[TeacherRequest], *, top_k: int, ids: Tensor | None = None
    ) -> TokenColumns:
        def ask(asked: list[TeacherRequest], places: Tensor) -> TokenColumns:
            own = None if ids is None else ids[places]
            return self.teacher.columns(asked, top_k=top_k, ids=own)

        return self._asked_where_it_fits(requests, ask)

    def _asked_where_it_fits(
        self,
        requests: Sequence[TeacherRequest],
        ask: Callable[[list[TeacherRequest], Tensor], Any],
    ) -> Any:
        """Ask the inner teacher about the rewritten requests, whose tokens have these positions
        among all. Tokens of requests that do not fit stay NaN."""
        shown = [self._show(request) for request in requests]
        lengths = torch.tensor([len(request.completion) for request in requests], dtype=torch.int64)
        fits = torch.tensor([request is not None for request in shown], dtype=torch.bool)
        places = fits.repeat_interleave(lengths).nonzero().flatten()
        found = ask([request for request in shown if request is not None], places)
        return found if bool(fits.all()) else found.placed(places, int(lengths.sum()))

    def _show(self, request: TeacherRequest) -> TeacherRequest | None:
        """Return the request as the teacher sees it; None if it does not fit into its context."""
        # If something that the template names is missing, use the student's prompt, in the
        # teacher's own form if it has one.
        ids = self._privileged_ids(request)
        is_privileged = ids is not None
        if ids is None and self._has_own_form and request.problem is not None:
            ids = encoded(self._encode, request.problem.asked, request.problem)
        if ids is None:
            ids = request.prompt

        # Only the prompt is replaced. The completion's ids do not change, so the log-probs are of
        # the same tokens.
        completion = request.completion
        if self._ends and completion:
            # Replace it by the teacher's own end token: same length, same event.
            completion = list(completion)
            for place in _ends_of_turns(request):
                completion[place] = self._ends.get(completion[place], completion[place])

        fits = self.context is None or len(ids) + len(completion) <= self.context
        # A teacher that rarely sees the answer is hardly better, so the share is a metric.
        self.num_asked += 1
        self.num_counted += is_privileged and fits
        return replace(request, prompt=ids, completion=completion) if fits else None

    def _privileged_ids(self, request: TeacherRequest) -> Sequence[int] | None:
        """Return the prompt that shows more than the student's; None if there is nothing to
        show."""
        if self._blocks is not None:
            fitted = self.fitted(request)
            if fitted is None:
                return None
            self._counts["shown"] += 1
            self._counts["successes"] += fitted.num_successes
            self._counts["shortened"] += fitted.num_shortened > 0
            self._counts["dropped_blocks"] += fitted.num_dropped > 0
            return fitted.token_ids
        prompt = privileged_prompt(self.template, request.problem, peer_solution(request))
        if prompt is None or request.problem is None:
            return None
        return encoded(self._encode, prompt, request.problem)

    def _room(self, request: TeacherRequest) -> int | None:
        return None if self.context is None else self.context - len(request.completion)

    def pop_metrics(self) -> dict[str, float]:
        metrics = super().pop_metrics()
        if number := self._counts["shown"]:
            metrics["teacher/shown_successes/mean"] = self._counts["successes"] / number
            for name in ("shortened", "dropped_blocks"):
                metrics[f"teacher/{name}/frac"] = self._counts[name] / number
        self._counts.clear()
        return metrics


def _ends_of_turns(request: TeacherRequest) -> list[int]:
    """Return the positions of the last token of each of the student's turns."""
    actions = request.actions
    places = range(len(request.completion))
    if not actions:
        return [places[-1]]
    return [i for i in places if actions[i] and not (i + 1 < len(actions) and actions[i + 1])]


# --- what it is shown -----------------------------------------------------------------------------


def peer_solution(request: TeacherRequest) -> str | None:
    """Return the first correct completion of another rollout of the group whose text, without
    thoughts, differs from this one's."""
    own = request.rollout and text_without_thoughts(request.rollout).strip()
    found = next(
        (
            one.text
            for one in request.peers
            if one.verdict == Verdict.CORRECT and text_without_thoughts(one).strip() != own
        ),
        None,
    )
    # It was written with pictures, but has none of its own.
    return None if found is None else without_markers(found)


def shown_values(problem: Problem, peer_solution: str | None) -> dict[str, str]:
    """Return the values that a template may name: texts and numbers of the problem's metadata, its
    prompt and answer, and a peer's solution."""
    shown = metadata_texts(problem) | {"prompt": problem.question, "answer": problem.answer}
    return shown | {"peer_solution": peer_solution or ""}


def privileged_prompt(
    template: str, problem: Problem | None, peer_solution: str | None
) -> Prompt | None:
    """Fill the template for the teacher's prompt (in a conversation, its last message). Returns
    None if something that the template names is missing or empty."""
    # An empty answer in the template would mislead the teacher, so either all names are filled or
    # the template is not used.
    values = shown_values(problem, peer_solution) if problem else {}
    if problem is None or not all(values.get(name) for name in template_names(template)):
        return None
    return in_place_of_question(problem, fill_template(template, values))


def encoder(settings: PrivilegedTeacherConfig, setting: Setting) -> Encode:
    """Return a function from a prompt with pictures to token ids of the student, in the form that
    the section asks for.

    Raises `UserError` if the teacher's own template is wanted and there is none.
    """
    tokenizer = setting.student_tokenizer
    own = settings.model_dump(include={"system_prompt", "chat_template_kwargs"}, exclude_none=True)
    rollout = setting.config.rollout.model_copy(update=own)
    if settings.chat_template == "student":
        return partial(prompt_token_ids, tokenizer, rollout=rollout, vision=setting.vision)
    name = _tokenizer_name(settings.teacher)
    theirs = load_tokenizer(name) if name is not None else None
    if theirs is None or not theirs.chat_template:
        raise UserError(
            f"teacher.chat_template is 'teacher', but {settings.teacher.title!r} has no tokenizer "
            "with a chat template (for a served teacher, local_model's is used); use 'student', or "
            "another teacher."
        )

    def encode(prompt: Prompt, pictures: Sequence[Picture] = ()) -> Sequence[int]:
        if pictures:
            raise UserError(
                "teacher.chat_template = 'teacher' supports only texts, but a problem has "
                "pictures; set it to 'student', whose placeholders both models know."
            )
        # Format with the teacher's template, and tokenise with the student's tokenizer, since the
        # teacher scores the student's tokens.
        messages = chat_messages(prompt, rollout.system_prompt)
        text = chat_text(theirs, messages, rollout.chat_template_kwargs, whose="teacher")
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return encode


def _tokenizer_name(settings: Any) -> str | None:
    """Return the model or folder with the teacher's own tokenizer; None if there is none."""
    match settings:
        case CachedTeacherConfig():
            return _tokenizer_name(settings.teacher)
        case LocalTeacherConfig():
            return settings.model
        case ServedTeacherConfig():
            return settings.local_model
        case AdapterTeacherConfig() if has_tokenizer(settings.adapter):
            return settings.adapter
    return None


def teacher_context(settings: Any, setting: Setting) -> int | None:
    """Return the shortest context, in tokens, of the teachers in a section; None if none states
    one. Servers are asked for theirs. Raises `UserError` if a server does not answer."""
    contexts = []
    for _, one in single_teachers(settings):
        if one.context_of == "server":
            contexts.append(scored_context(one, setting))
        elif one.context_of == "model":
            contexts.append(context_tokens(load_model_config(one.model)))
        elif one.context_of == "student":
            contexts.append(setting.student_context)
    return min((tokens for tokens in contexts if tokens is not None), default=None)


# --- check and make -------------------------------------------------------------------------------


def check_teacher(settings: PrivilegedTeacherConfig, setting: Setting) -> list[Finding]:
    # Imported here, since it uses this file to make prompts.
    from rlad.teachers.privileged_check import check_privileged

    return check_privileged(settings, setting)


def make_blocks(
    context: ContextConfig, settings: PrivilegedTeacherConfig, setting: Setting
) -> BlockContext:
    """Make the `BlockContext` of a teacher's section, in the form that the section asks for."""
    return BlockContext(
        context,
        seed=setting.config.seed,
        tokenizer=setting.student_tokenizer,
        encode=encoder(settings, setting),
    )


def make_teacher(settings: PrivilegedTeacherConfig, setting: Setting) -> PrivilegedTeacher:
    return privileged(build_teacher(settings.teacher, setting), settings, setting)


def privileged(
    teacher: Teacher, settings: PrivilegedTeacherConfig, setting: Setting
) -> PrivilegedTeacher:
    """Wrap a teacher so that it is shown what a section asks for."""
    assert setting.student is not None
    # Include only what differs from the defaults, so that a new setting does not change old
    # identities.
    form = settings.model_dump(include=FORM, exclude_defaults=True)
    ends = {}
    if settings.end_token is not None:
        own_end = token_id(setting.student_tokenizer, settings.end_token, "teacher.end_token")
        # The student may have several end tokens; the teacher has one for all of them.
        ends = dict.fromkeys(setting.student.eos_token_ids, own_end)
    return PrivilegedTeacher(
        teacher,
        settings.template,
        encode=encoder(settings, setting),
        context=teacher_context(settings.teacher, setting),
        form=json.dumps(form, sort_keys=True) if form else "",
        ends=ends,
        blocks=settings.context and make_blocks(settings.context, settings, setting),
    )
