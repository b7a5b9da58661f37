"""Make the model's input token ids from a problem's prompt."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlad.config.run import RolloutConfig, RunConfig
from rlad.config.template import fill_template
from rlad.errors import UserError
from rlad.models.pictures import Picture, PicturedPrompt
from rlad.models.vision import Vision
from rlad.rollouts.pictured_prompts import (
    chat_text_with_pictures,
    plain_text_with_pictures,
    require_no_placeholder,
    with_markers,
)
from rlad.tasks import Problem, Split, Task

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date given to chat templates that ask for the current one. It is fixed, since prompts of a
resumed run, of an evaluation and of a cached teacher must not change from day to day. Llama's
template uses this date if it has no clock."""
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

Prompt = str | tuple[tuple[str, str], ...]
"""A single user message, or a conversation: (role, content) of each message."""


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    rollout: RolloutConfig,
    pictures: Sequence[Picture] = (),
    vision: Vision | None = None,
) -> Sequence[int]:
    """Tokenize a prompt: with the chat template (`chat`), unchanged (`plain`), or with the template
    if the tokenizer has one (`auto`). `vision` is the model's picture processor, which makes the
    placeholders for `pictures`.

    Raises `UserError` for `chat` without a template, for a conversation that only a template can
    express, and for pictures if the model reads only text.
    """
    if rollout.prompt_format == "chat" and not tokenizer.chat_template:
        raise UserError(
            "rollout.prompt_format is 'chat' but the student's tokenizer has no chat template; use "
            "'plain' or 'auto'."
        )
    # Texts without pictures need no picture processor.
    if vision is not None and (pictures or vision.has_processor):
        return _seen_token_ids(tokenizer, prompt, rollout, pictures, vision)
    if pictures:
        raise UserError(
            "a problem has pictures, but the student reads only text; use a vision model as the "
            "student, or problems without pictures."
        )
    if is_plain(tokenizer, rollout.prompt_format):
        return _plain_token_ids(tokenizer, plain_text(prompt, rollout))
    text = chat_text(
        tokenizer, chat_messages(prompt, rollout.system_prompt), rollout.chat_template_kwargs
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _seen_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    rollout: RolloutConfig,
    pictures: Sequence[Picture],
    vision: Vision,
) -> Sequence[int]:
    """Tokenize a prompt of a vision model."""
    is_text = is_plain(tokenizer, rollout.prompt_format)
    if is_text:
        conversation: Sequence[tuple[str, str]] = [("user", plain_text(prompt, rollout))]
    else:
        messages = chat_messages(prompt, rollout.system_prompt)
        conversation = [(message["role"], message["content"]) for message in messages]
    conversation = with_markers(conversation, len(pictures))
    for _, content in conversation:
        require_no_placeholder(content, vision)
    if is_text:
        text = plain_text_with_pictures(conversation[0][1], vision)
        if not pictures:
            return _plain_token_ids(tokenizer, text)
    else:
        text = chat_text_with_pictures(
            conversation,
            vision,
            rollout.chat_template_kwargs,
            len(pictures),
            template=without_clock(tokenizer),
        )
        if not pictures:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = vision.prompt(text, pictures, add_special_tokens=is_text)
    # As in a plain prompt: nothing comes after an end token.
    if (
        is_text
        and ids[-1] == tokenizer.eos_token_id
        and not text.endswith(str(tokenizer.eos_token))
    ):
        ids = PicturedPrompt(ids[:-1], pictures)
    return ids


def _plain_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Some tokenizers put their end token after every text, but nothing comes after an end token.
    is_added = ids[-1:] == [tokenizer.eos_token_id] and ids[:-1][-len(bare) :] == bare
    return ids[:-1] if is_added else ids


def is_plain(tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> bool:
    """Return whether prompts are used unchanged, not as messages of a chat."""
    return prompt_format == "plain" or not tokenizer.chat_template


def plain_text(prompt: Prompt, rollout: RolloutConfig) -> str:
    """Return the text of a plain prompt. Raises `UserError` for what only a chat template can
    express."""
    for name in ("system_prompt", "chat_template_kwargs"):
        if getattr(rollout, name):
            raise UserError(
                f"rollout.{name} does not work with plain prompts (rollout.prompt_format = "
                "'plain', or a tokenizer without a chat template); leave it out, or use a model "
                "with a chat template."
            )
    if isinstance(prompt, str):
        return prompt
    if [role for role, _ in prompt] != ["user"]:
        roles = ", ".join(role for role, _ in prompt)
        raise UserError(
            f"a prompt is a conversation ({roles}), which plain prompts (rollout.prompt_format = "
            "'plain', or a tokenizer without a chat template) cannot express; use a model with a "
            "chat template, or give each prompt as one text."
        )
    return prompt[0][1]


def chat_messages(prompt: Prompt, system_prompt: str | None) -> list[dict[str, str]]:
    """Return the messages of a conversation for a chat template. The conversation's own system
    message wins."""
    conversation = (("user", prompt),) if isinstance(prompt, str) else prompt
    if system_prompt is not None and conversation[0][0] != "system":
        conversation = (("system", system_prompt), *conversation)
    return [{"role": role, "content": content} for role, content in conversation]


def chat_text(
    tokenizer: Any,
    messages: list[dict[str, str]],
    variables: dict[str, Any],
    whose: str = "student",
) -> str:
    """Format the conversation, up to where the answer begins, with a tokenizer's chat template.

    `whose` is for error texts. Raises `UserError` if the template fails, does not know a variable,
    or omits the system message or a user message.
    """
    the_template = f"the chat template of the {whose}'s tokenizer"
    template = str(tokenizer.chat_template)
    if unknown := [
        name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)
    ]:
        raise UserError(
            f"{the_template} does not know {unknown[0]!r}; leave it out of chat_template_kwargs, "
            "or correct its name."
        )
    try:
        text = str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                chat_template=without_clock(tokenizer),
                **variables,
            )
        )
    except (TemplateError, ArithmeticError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{the_template} fails ({error}); fix it, or set rollout.prompt_format = 'plain'."
        ) from None
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise UserError(
            f"{the_template} omits the system message; put its text into the prompts instead."
        )
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "user" and content not in text:
            raise UserError(
                f"{the_template} omits or changes the user's message {content[:60]!r}, so its "
                "question is not in the prompt; fix the template, or set "
                "rollout.prompt_format = 'plain'."
            )
    return text


def without_clock(tokenizer: Any) -> str:
    """Return a tokenizer's chat template with `TEMPLATE_DATE` instead of the current date."""
    template = str(tokenizer.get_chat_template())
    return _CLOCK.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), template)


def dates_in_template(tokenizer: Any) -> list[str]:
    """Return the dates that a tokenizer's chat template is given."""
    calls = _CLOCK.finditer(str(tokenizer.get_chat_template()))
    return [TEMPLATE_DATE.strftime(call[2]) for call in calls]


def check_prompt_length(
    num_tokens: int, what: str, rollout: RolloutConfig, context_tokens: int | None
) -> None:
    """Raise `UserError` if a prompt leaves no room for its completion, or is longer than the config
    allows."""
    limits = []
    if rollout.max_prompt_tokens is not None:
        limits.append((rollout.max_prompt_tokens, "rollout.max_prompt_tokens"))
    if context_tokens is not None:
        most = rollout.max_completion_tokens
        why = f"context of {context_tokens} minus rollout.max_completion_tokens = {most}"
        limits.append((context_tokens - most, why))
    longest, why = min(limits, key=lambda limit: limit[0], default=(num_tokens, ""))
    if num_tokens > longest:
        raise UserError(
            f"the prompt of {what} has {num_tokens} tokens, but at most {max(longest, 0)} are "
            f"allowed ({why}); shorten the prompts or change that setting."
        )


def in_place_of_question(problem: Problem, text: str) -> Prompt:
    """Return the prompt of a problem with the user's last message replaced by `text`."""
    return (*problem.messages[:-1], (problem.messages[-1][0], text)) if problem.messages else text


def reasoning_prompt(
    config: RunConfig,
    problem: Problem,
    what: str,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int | None,
    vision: Vision | None,
) -> Sequence[int]:
    """Tokenize an objective's prompt for the reasoning only; the picture stays in it.

    Raises `UserError` if it leaves no room for a completion.
    """
    template: str = getattr(config.objective, "reasoning_template", "{prompt}")
    shown = in_place_of_question(problem, fill_template(template, {"prompt": problem.question}))
    ids = prompt_token_ids(tokenizer, shown, config.rollout, problem.images, vision)
    # `max_prompt_tokens` limits only the student's own prompts.
    unbounded = config.rollout.model_copy(update={"max_prompt_tokens": None})
    what = f"{what} in objective.reasoning_template"
    check_prompt_length(len(ids), what, unbounded, context_tokens)
    return ids


NUM_PROBED_PROBLEMS = 20


def longest_prompt(
    config: RunConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int | None,
    ood_task: Task | None = None,
    vision: Vision | None = None,
) -> int:
    """Return the number of tokens of the longest prompt, among all prompts of a finite task or the
    first few of an endless one.

    Raises `UserError` if one leaves no room for its completion.
    """
    rollout = config.rollout
    evaluation = config.evaluation
    num_train = config.optimization.num_rollout_batches * rollout.prompts_per_batch
    wanted: list[tuple[str, Task, Split, int]] = [
        ("train", task, "train", num_train),
        ("validation", task, "validation", evaluation.num_validation_problems),
        ("test", task, "test", evaluation.num_test_problems),
    ]
    if ood_task is not None:
        wanted.append(("out-of-distribution test", ood_task, "test", evaluation.num_ood_problems))
    longest = 0
    for name, source, split, number in wanted:
        for i in range(min(number, source.num_problems(split) or NUM_PROBED_PROBLEMS)):
            problem = source.problem(split, i, seed=config.seed if split == "train" else 0)
            prompt = prompt_token_ids(tokenizer, problem.asked, rollout, problem.images, vision)
            check_prompt_length(len(prompt), f"{name} problem {i}", rollout, context_tokens)
            longest = max(longest, len(prompt))
            if config.objective.weighs_roles and split == "train":
                what = f"{name} problem {i}"
                reasoning_prompt(config, problem, what, tokenizer, context_tokens, vision)
    return longest
