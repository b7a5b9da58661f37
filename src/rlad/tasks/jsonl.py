"""Problems from a file of your own: JSON Lines, or a data set of the package `datasets`."""

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlad.errors import UserError
from rlad.tasks.base import Judgement, Problem, Split, check_split, split_of, text_key
from rlad.tasks.conversations import asked_text, conversation, require_text, shown
from rlad.tasks.verifiers import make_verifier
from rlad.tasks.worker import MAX_MEMORY_GIB

Row = tuple[str, Any]  # its place, and what it is
_MOST_SHOWN = 200
"""characters of what a file holds in an error message"""


class JsonlTask:
    """The problems of a file, each with a prompt and a reference answer, graded by a verifier (see
    `rlad.tasks.verifiers`).

    A prompt is a string, or the messages of a conversation, `[{"role": "system", "content": ...},
    ...]`, the user's last. A split without a file of its own gets its share of `path` by a hash of
    the prompt; prompts that are equal up to case, white space and system message stay together. A
    prompt of `path` that is also in `validation_path` or `test_path` is refused. Other fields that
    hold text or numbers, such as a hint for a privileged teacher, are the problem's metadata. A
    path that does not end in `.jsonl` is a folder that `datasets` has saved, or a name on the hub
    (`name:subset`), of which `path` takes the split train, `validation_path` validation and
    `test_path` test.
    """

    name = "jsonl"

    def __init__(
        self,
        path: str,
        validation_path: str | None = None,
        test_path: str | None = None,
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        verifier: str = "exact",
        timeout_seconds: float = 5.0,
        max_memory_gib: float = MAX_MEMORY_GIB,
    ) -> None:
        self._verifier = make_verifier(
            verifier, timeout_seconds=timeout_seconds, max_memory_gib=max_memory_gib
        )

        def load(source: str, split: Split) -> list[Problem]:
            return [
                _problem(row, where, prompt_field, answer_field)
                for where, row in _rows(source, split)
            ]

        problems = load(path, "train")
        held_out: dict[Split, str | None] = {"validation": validation_path, "test": test_path}
        self._problems: dict[Split, list[Problem]] = {"train": [], "validation": [], "test": []}
        for split, source in held_out.items():
            if source is not None:
                self._problems[split] = load(source, split)
                _refuse_overlap(path, problems, source, self._problems[split])
        if validation_path is not None and test_path is not None:
            _refuse_overlap(
                validation_path, self._problems["validation"], test_path, self._problems["test"]
            )
        # What falls into a split that has a file of its own is trained on.
        for problem in problems:
            split = split_of(problem.key)
            self._problems["train" if held_out.get(split) else split].append(problem)
        for split, found in self._problems.items():
            if not found:
                raise UserError(
                    f"{path}: none of its {len(problems)} problems falls into the split {split}; "
                    "give more problems, or files of their own for validation (validation_path) "
                    "and test (test_path)."
                )

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        check_split(split)
        problems = self._problems[split]
        # Every epoch has all problems once, in an order of its own.
        epoch, position = divmod(index, len(problems))
        return problems[_order(seed, split, epoch, len(problems))[position]]

    def num_problems(self, split: Split) -> int:
        return len(self._problems[split])

    def judge(self, problem: Problem, completion: str) -> Judgement:
        return self._verifier.judge(completion, problem.answer)

    def close(self) -> None:
        self._verifier.close()


@lru_cache(maxsize=16)
def _order(seed: int, split: Split, epoch: int, num_problems: int) -> list[int]:
    order = list(range(num_problems))
    random.Random(f"{seed}/{split}/{epoch}").shuffle(order)
    return order


def _rows(source: str, split: Split) -> list[Row]:
    rows = _jsonl_rows(source) if source.endswith(".jsonl") else _saved_rows(source, split)
    found = list(rows)
    if not found:
        raise UserError(
            f"{source}: there is no problem in it; write at least one, with a prompt and an answer."
        )
    return found


def _jsonl_rows(source: str) -> Iterator[Row]:
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"{source}: there is no such file; give the path of a .jsonl file, one JSON object a "
            "line."
        )
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            yield where, json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(
                f"{where}: not JSON ({error}); write one JSON object in UTF-8 a line."
            ) from error


def _saved_rows(source: str, split: Split) -> Iterator[Row]:
    """Read a folder or a name on the hub with the package `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source}: a path that does not end in .jsonl is read with the package datasets, "
            f"which is not installed ({error}); give a .jsonl file, or pip install "
            '"rlad[datasets]".'
        ) from error
    try:
        if Path(source).is_dir():
            data: Any = datasets.load_from_disk(source)
        else:
            name, _, subset = source.partition(":")
            data = datasets.load_dataset(name, subset or None)
    except Exception as error:  # the package raises all kinds on a wrong name or without a network
        raise UserError(
            f"{source}: datasets cannot load it ({type(error).__name__}: {error}); give a .jsonl "
            "file, a folder made by save_to_disk, or a name on the Hugging Face hub."
        ) from error
    if isinstance(data, dict):
        if split not in data:
            raise UserError(
                f"{source}: it has no split {split!r}, only {', '.join(data)}; give one that has "
                "it."
            )
        data = data[split]
    return ((f"{source}, row {number}", row) for number, row in enumerate(data, start=1))


def _problem(row: Any, where: str, prompt_field: str, answer_field: str) -> Problem:
    if not isinstance(row, dict):
        wanted = f"{prompt_field!r} and {answer_field!r}"
        raise UserError(
            f"{where}: holds a {type(row).__name__}; write a JSON object with the fields {wanted}."
        )
    value = row.get(prompt_field)
    if isinstance(value, list):
        messages = conversation(value, f"{where}: the field {prompt_field!r}")
        prompt = shown(messages)
        question = asked_text(messages)
    else:
        messages = ()
        prompt = question = _text(row, prompt_field, where, "prompt_field")
    answer = _text(row, answer_field, where, "answer_field")
    # A privileged teacher may show the other fields to itself, so those that are plain text stay.
    metadata = {
        name: value
        for name, value in row.items()
        if name not in (prompt_field, answer_field) and isinstance(value, str | int | float)
    }
    for name, value in metadata.items():
        require_text(f"{name}{value}", f"{where}: the field {name!r}")
    return Problem(prompt, answer, text_key(question), metadata=metadata, messages=messages)


def _text(row: dict[str, Any], field: str, where: str, setting: str) -> str:
    if field not in row:
        there = ", ".join(map(repr, row))[:_MOST_SHOWN] or "none at all"
        raise UserError(f"{where}: has no field {field!r}, only {there}; name it with {setting}.")
    value = row[field]
    if isinstance(value, int | float) and not isinstance(value, bool) and setting == "answer_field":
        return str(value)
    if not isinstance(value, str) or not value.strip():
        came = f"is {json.dumps(value, default=str)[:60]}"
        raise UserError(f"{where}: the field {field!r} {came}; give a string that is not empty.")
    require_text(value, f"{where}: the field {field!r}")
    return value


def _refuse_overlap(
    path: str, problems: list[Problem], held_out_path: str, held_out: list[Problem]
) -> None:
    keys = {problem.key for problem in held_out}
    shared = [problem for problem in problems if problem.key in keys]
    if shared:
        raise UserError(
            f"{path}: {len(shared)} of its {len(problems)} prompts are also in {held_out_path}, "
            f"for example {shared[0].prompt[:80]!r}; remove them from one of the two files."
        )
