"""The test problems of a run for lm-eval, and rlad's verdict on an answer: 1 for a correct one.

`RLAD_RUN` names the run directory. `rlad_run.yaml` names this file.
"""

import os
from functools import cache
from typing import Any

from datasets import Dataset

from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.tasks import Task, Verdict, make_task


@cache
def _run() -> tuple[RunConfig, Task]:
    run = os.environ.get("RLAD_RUN")
    if run is None:
        raise ValueError(
            "RLAD_RUN is not set; give the run directory whose test problems are wanted: "
            "RLAD_RUN=runs/my_run."
        )
    config = load_config(run)
    return config, make_task(**config.task.model_dump())


def problems(**_: Any) -> dict[str, Dataset]:
    config, task = _run()
    number = min(
        config.evaluation.num_test_problems,
        task.num_problems("test") or config.evaluation.num_test_problems,
    )
    found = [task.problem("test", i) for i in range(number)]
    if any(problem.messages for problem in found):
        raise ValueError(
            "the run's problems are conversations, which this recipe cannot pass to lm-eval; use "
            "`rlad evaluate`."
        )
    rows = [
        {"index": i, "prompt": problem.prompt, "answer": problem.answer}
        for i, problem in enumerate(found)
    ]
    return {"test": Dataset.from_list(rows)}


def graded(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    _, task = _run()
    return {
        "exact_match": float(
            task.judge(task.problem("test", row["index"]), answers[0]).verdict == Verdict.CORRECT
        )
    }
