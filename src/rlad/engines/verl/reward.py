"""A custom reward function for verl: the task of a run's config grades the student's completions.
Imports no verl.

`rlad export verl` names it in the command:
`reward.custom_reward_function.path=pkg://rlad.engines.verl.reward`.
"""

from collections.abc import Mapping
from functools import cache
from threading import Lock
from typing import Any

from rlad.config.file import load_config
from rlad.errors import UserError
from rlad.tasks import Task, Verdict, make_task

_LOCK = Lock()


@cache
def _task_of(config: str) -> Task:
    return make_task(**load_config(config).task.model_dump())


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any],
    *,
    config: str,
    **_: Any,
) -> dict[str, float]:
    """Return reward and correctness (1 or 0) of one completion; `config` is the path of the run's
    TOML file.

    `extra_info` has `split`, `index` and `seed` of the problem. Raises `UserError` if the verifier
    cannot judge (verl then leaves the completion out of its group), or if the problem differs from
    the one in the data.
    """
    with _LOCK:  # verl calls from several threads at once
        task = _task_of(config)
        problem = task.problem(
            extra_info["split"], int(extra_info["index"]), seed=int(extra_info["seed"])
        )
        # Generated problems or an edited file could otherwise silently be graded with other
        # answers.
        if problem.answer != ground_truth:
            raise UserError(
                f"{extra_info['split']} problem {extra_info['index']} of {data_source} has another "
                "answer than in verl's data: the task has changed since the export; run "
                "`rlad export verl` again."
            )
        judgement = task.judge(problem, solution_str)
    if judgement.verdict == Verdict.CANNOT_JUDGE:
        raise UserError(
            f"the verifier of {data_source} cannot judge a completion ({judgement.reason}); it is "
            "left out."
        )
    return {"score": judgement.reward, "acc": float(judgement.verdict == Verdict.CORRECT)}
