"""A user's own problems: from files, or from a data set of the package `datasets`."""

import itertools
import json
import math
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from rlad.config.task import JsonlConfig
from rlad.errors import UserError
from rlad.models.pictures import Picture
from rlad.tasks.answers import ANSWER_FORMATS
from rlad.tasks.base import SOLUTION, SPLITS, Judgement, Problem, Split, split_of, text_key
from rlad.tasks.conversations import asked_text, conversation_mistakes, shown
from rlad.tasks.data_files import rows_of
from rlad.tasks.pictured_rows import pictures_of_row, require_markers, with_text_parts
from rlad.tasks.verifiers import make_verifier

_MOST_SHOWN = 200
"""most characters of a file's content in an error message"""


class JsonlTask:
    """The problems of a file, each with a prompt and a reference answer, graded by a verifier (see
    `rlad.tasks.verifiers`).

    A prompt is a string, or the messages of a conversation, `[{"role": "system", "content": ...},
    ...]`, whose last is the user's. A split without its own file gets its share of `path` by a hash
    of the prompt. Prompts that differ only in case, white space or system message are in the same
    split. Prompts of `path` that are also in `validation_path` or `test_path` are refused. Other
    fields with text or numbers, such as a hint for a privileged teacher, become the problem's
    metadata. So does the whole answer field, as `solution`, if `answer_format` extracts a part of
    it. A path is a file (`rlad.tasks.data_files`), a folder of files, a folder saved by `datasets`,
    or a name on the hub (`name:subset`). From the last three, `path` uses the split train,
    `validation_path` validation and `test_path` test.
    """

    name = "jsonl"

    def __init__(self, path: str, **settings: Any) -> None:
        config = JsonlConfig(path=path, **settings)
        self._verifier = make_verifier(
            config.verifier,
            timeout_seconds=config.timeout_seconds,
            max_memory_gib=config.max_memory_gib,
        )
        self.has_built_in_verifier = ":" not in config.verifier
        sources = {"train": path, "validation": config.validation_path, "test": config.test_path}
        loaded: dict[str, list[Problem]] = {
            split: _load(source, split, config)
            for split, source in sources.items()
            if source is not None
        }
        for one, other in itertools.combinations(loaded, 2):
            keys = {problem.key for problem in loaded[other]}
            shared = [problem.prompt for problem in loaded[one] if problem.key in keys]
            if shared:
                raise UserError(
                    f"{sources[one]}: {len(shared)} of its {len(loaded[one])} prompts are also in "
                    f"{sources[other]}, for example {shared[0][:80]!r}; remove them from one of "
                    "the two files."
                )
        # Problems of a split that has its own file are used for training.
        self._problems = {split: loaded.get(split, []) for split in SPLITS} | {"train": []}
        for problem in loaded["train"]:
            split = split_of(problem.key)
            self._problems["train" if split in loaded else split].append(problem)
        for split, found in self._problems.items():
            if not found:
                raise UserError(
                    f"{sources[split] or path}: none of its problems is for the split {split}; "
                    "give more problems, or files of their own for validation (validation_path) "
                    "and test (test_path)."
                )

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        problems = self._problems[split]
        # Every epoch has all problems once, in its own order.
        epoch, position = divmod(index, len(problems))
        return problems[_order(seed, split, epoch, len(problems))[position]]

    def num_problems(self, split: Split) -> int:
        return len(self._problems[split])

    def judge(self, problem: Problem, completion: str) -> Judgement:
        return self.grade(completion, problem.answer)

    def grade(self, completion: str, answer: str) -> Judgement:
        """Compare a completion with a reference answer."""
        return self._verifier.judge(completion, answer)

    def close(self) -> None:
        self._verifier.close()


@lru_cache(maxsize=16)
def _order(seed: int, split: Split, epoch: int, num_problems: int) -> list[int]:
    order = list(range(num_problems))
    random.Random(f"{seed}/{split}/{epoch}").shuffle(order)
    return order


def _load(source: str, split: str, config: JsonlConfig) -> list[Problem]:
    problems = []
    for where, row in rows_of(source, split).items():
        fields = {"prompt_field": config.prompt_field, "answer_field": config.answer_field}
        row = with_text_parts(row, config.prompt_field)
        if mistake := next(_mistakes(row, fields), ""):
            raise UserError(f"{where}: {mistake}")
        answer = ANSWER_FORMATS[config.answer_format](str(row[config.answer_field]))
        if not answer:
            raise UserError(
                f"{where}: the field {config.answer_field!r} has no answer of the format "
                f"{config.answer_format!r}, only {str(row[config.answer_field])[:80]!r}; set "
                "answer_format to another one, or leave it out."
            )
        images = pictures_of_row(row, config.images_field, source=source, where=where)
        problems.append(_problem(row, answer, config, images))
        require_markers(problems[-1].prompt, len(images), where)
    return problems


def _mistakes(row: Any, fields: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with a row. `fields` maps settings to the names of prompt and answer."""
    if not isinstance(row, dict):
        wanted = " and ".join(map(repr, fields.values()))
        yield f"holds a {type(row).__name__}; write a JSON object with the fields {wanted}."
    for setting, field in fields.items():
        if field not in row:
            there = ", ".join(map(repr, row))[:_MOST_SHOWN] or "none at all"
            yield f"has no field {field!r}, only {there}; name it with {setting}."
        value = row[field]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not math.isfinite(value):
            yield f"the field {field!r} is {value}, which no answer can match; remove the row."
        if setting == "prompt_field" and isinstance(value, list):
            yield from _conversation_mistakes(row, field)
        elif not (isinstance(value, str) and value.strip()) and not (
            is_number and setting == "answer_field"
        ):
            came = json.dumps(value, default=str)[:60]
            yield f"the field {field!r} is {came}; give a string that is not empty."
    text = json.dumps(row, ensure_ascii=False, default=str)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        yield "has half of a surrogate pair, which is not valid text; remove it."


def _conversation_mistakes(row: dict[str, Any], field: str) -> Iterator[str]:
    for mistake in conversation_mistakes(row[field]):
        yield f"the field {field!r}: {mistake}"
    for part in ("tools", "documents"):
        if row.get(part):
            yield (
                f"has {part!r}, which a prompt would leave out; write them into the first message, "
                "or remove them."
            )


def _problem(
    row: dict[str, Any], answer: str, config: JsonlConfig, images: tuple[Picture, ...]
) -> Problem:
    prompt = question = row[config.prompt_field]
    messages = ()
    if isinstance(prompt, list):
        messages = tuple((message["role"], message["content"]) for message in prompt)
        prompt = shown(messages)
        question = asked_text(messages)
    # A privileged teacher may see the other fields, so those with text or numbers are kept.
    metadata = {
        name: value
        for name, value in row.items()
        if name not in (config.prompt_field, config.answer_field, config.images_field)
        and isinstance(value, str | int | float)
    }
    # The text from which the answer was extracted is the reference solution, unless the row has a
    # field of that name.
    whole = str(row[config.answer_field]).strip()
    if config.answer_format != "whole" and whole != answer:
        metadata.setdefault(SOLUTION, whole)
    # The same question about another picture is another problem.
    key = text_key("\n".join([question, *(one.digest for one in images)]))
    return Problem(prompt, answer, key, metadata=metadata, messages=messages, images=images)
