"""Show what the student really reads: its first prompt, and surprises in chat templates."""

from typing import Any

from rlad.config.run import RunConfig
from rlad.config.task import KnightsAndKnavesConfig, SeveralTasksConfig
from rlad.findings import Finding
from rlad.models.vision import Vision
from rlad.rollouts.prompts import (
    TEMPLATE_DATE,
    chat_messages,
    chat_text,
    dates_in_template,
    is_plain,
    prompt_token_ids,
    without_clock,
)
from rlad.rollouts.texts import special_tags, written_thought
from rlad.tasks import Problem, Task

_SUBJECT = "first prompt"
_MOST_SHOWN = 1_000


def check_first_prompt(
    config: RunConfig, task: Task, tokenizer: Any, vision: Vision | None = None
) -> list[Finding]:
    """Show the first training prompt with its special tokens, and warn of surprises in it."""
    problem = task.problem("train", 0, seed=config.seed)
    token_ids = prompt_token_ids(tokenizer, problem.asked, config.rollout, problem.images, vision)
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    shown = text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN // 2]} ... {text[-300:]}"
    warnings = [Finding("warning", _SUBJECT, message) for message in _thought(config, text)]
    if vision is None and not is_plain(tokenizer, config.rollout.prompt_format):
        template = _template_warnings(config, problem, tokenizer)
        warnings += [Finding("warning", _SUBJECT, message) for message in template]
    findings = [Finding("ok", _SUBJECT, repr(shown)), *warnings]
    if tags := special_tags(tokenizer):
        message = f"verifiers see the special tokens {', '.join(tags.values())} in completions"
        findings.append(Finding("ok", "tags", message))
    return findings


def _thought(config: RunConfig, text: str) -> list[str]:
    tasks = (
        config.task.tasks.values() if isinstance(config.task, SeveralTasksConfig) else [config.task]
    )
    wants_format = any(
        isinstance(one, KnightsAndKnavesConfig) and one.reward == "logic_rl" for one in tasks
    )
    begun = written_thought(text)
    if not begun or not wants_format:
        return []
    return [
        f"it ends with {begun.strip()!r}, which the reward logic_rl asks for: verifiers get it "
        "before each completion."
    ]


def _template_warnings(config: RunConfig, problem: Problem, tokenizer: Any) -> list[str]:
    rollout = config.rollout
    variables = rollout.chat_template_kwargs
    messages = chat_messages(problem.asked, rollout.system_prompt)
    text = chat_text(tokenizer, messages, variables)
    warnings = []
    tags = special_tags(tokenizer).values()
    in_question = [
        token
        for token in tokenizer.all_special_tokens
        if token in problem.question and token not in tags
    ]
    if in_question:
        warnings.append(
            f"the problem's own text has {in_question[0]!r}, a special token, and gets the chat "
            "template around it; set rollout.prompt_format = 'plain' if it is a whole chat already."
        )
    tail = text.rpartition(messages[-1]["content"].strip())[2]
    for token in (tokenizer.eos_token, tokenizer.pad_token):
        tail = tail.replace(token or "\n", "")
    if not tail.strip():
        warnings.append(
            "the chat template ends it after the user's message, because it does not use "
            "add_generation_prompt: the student has to write the assistant's header itself; add "
            "that to the template."
        )
    if any(date in text for date in dates_in_template(tokenizer)):
        warnings.append(
            f"the chat template asks the clock, and is told {TEMPLATE_DATE:%d %b %Y} on every day, "
            "so that a run that is resumed or evaluated later has the same prompts; for another "
            "date set the template's variable for it in rollout.chat_template_kwargs."
        )
    if "strftime_now(" in without_clock(tokenizer):
        warnings.append(
            "the chat template asks the clock for a form that it makes itself, so that a run which "
            "is resumed on another day may have other prompts; take the clock out of the template."
        )
    return warnings
