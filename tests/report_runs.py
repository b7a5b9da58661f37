"""Run directories with chosen figures, written without training, for the tests of the report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from rlad.config.file import parse_config

NUM_STEPS = 4


def write_run(
    folder: Path,
    *,
    correct: Sequence[int],
    before: Sequence[int] | None = None,
    num_samples: int = 4,
    objective: str | dict[str, Any] = "trrd",
    seed: int = 0,
    keys: Sequence[str] | None = None,
    ood: Sequence[int] | None = None,
    metrics: Sequence[str] = (
        "reward/mean",
        "student/entropy/mean",
        "teacher/tokens/count",
        "memory/peak/bytes",
    ),
    samples: Sequence[dict[str, Any]] = (),
    finished: bool = True,
    num_turns: float | None = None,
    **sections: Any,
) -> Path:
    """`correct`: how many of the samples of each test problem were correct after training;
    `before`: none by default."""
    config = _config(objective, seed, num_samples, ood is not None, sections)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    (folder / "run.json").write_text("{}")
    keys = keys or [f"key {i}" for i in range(len(correct))]
    tests = [(0, "test", before or [0] * len(correct)), (NUM_STEPS, "test", correct)]
    tests += [(0, "ood", [0] * len(ood)), (NUM_STEPS, "ood", ood)] if ood else []
    tests += [
        (0, "validation", [0, 1]),
        (2, "validation", [1, 1]),
        (NUM_STEPS, "validation", [1, min(2, num_samples)]),
    ]
    wanted = [test for test in tests if finished or test[0] == 0]
    _write_rows(
        folder / "eval.jsonl",
        [
            _evaluation(step, split, counts, keys, num_samples, num_turns)
            for step, split, counts in sorted(wanted, key=lambda t: t[0])
        ],
    )
    _write_rows(
        folder / "metrics.jsonl",
        [_step(i, metrics) for i in range(1, NUM_STEPS + 1 if finished else 3)],
    )
    _write_rows(folder / "samples.jsonl", samples)
    if finished:
        (folder / "README.md").write_text("")
    return folder


def sample_row(
    step: int,
    tokens: Sequence[str],
    fates: str,
    *,
    advantage: float = 1.0,
    clamped: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row of `samples.jsonl` with one rollout."""
    imitation = {
        "fates": fates,
        "advantages": [advantage] * len(tokens),
        "log_ratio_to_teacher": [0.5] * len(tokens),
        "clamped": clamped or "." * len(tokens),
    }
    rollout = {
        "tokens": list(tokens),
        "verdict": "correct" if advantage > 0 else "wrong",
        "imitation": imitation,
    }
    return {"step": step, "prompt": "Who is a knight?", "rollouts": [rollout | more]}


def _config(
    objective: str | dict[str, Any],
    seed: int,
    num_samples: int,
    has_ood: bool,
    sections: dict[str, Any],
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "student": {"model": "embedded/student"},
        "teacher": {"model": "embedded/teacher"},
        "task": {"type": "knights_and_knaves", "num_people": [2, 3]},
        "objective": {"type": objective} if isinstance(objective, str) else objective,
        "rollout": {"prompts_per_batch": 2, "group_size": 8},
        "optimization": {"num_steps": NUM_STEPS},
        "evaluation": {
            "num_test_samples": num_samples,
            "ood_task": {"num_people": [4]} if has_ood else {},
        },
        "seed": seed,
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    parse_config(config)
    return config


def _evaluation(
    step: int,
    split: str,
    correct: Sequence[int],
    keys: Sequence[str],
    num_samples: int,
    num_turns: float | None,
) -> dict[str, Any]:
    """Episodes of the first problem have `num_turns` turns on average, of the next one more, ..."""
    results = [
        {
            "index": i,
            "key": keys[i],
            "difficulty": "4 people" if split == "ood" else f"{2 + i % 2} people",
            "num_samples": num_samples,
            "num_correct": count,
            "num_cannot_judge": 0,
            "num_truncated": 1 if i == 0 else 0,
            "mean_completion_tokens": 10.0 + i,
            "prompt": f"{split} problem {i}",
            "first_completion": "",
        }
        | ({} if num_turns is None else {"mean_turns": num_turns + i})
        for i, count in enumerate(correct)
    ]
    mean = sum(correct) / len(correct) / num_samples
    return {
        "step": step,
        "split": split,
        "pass@1": {"mean": mean, "low": mean, "high": mean},
        "results": results,
    }


def _step(step: int, metrics: Sequence[str]) -> dict[str, float]:
    row = {
        "step": step,
        "rollout/completion_tokens/mean": 5.0,
        "time/generation/seconds": 2.0,
        "time/rewards/seconds": 0.5,
    }
    row |= {"time/teacher/seconds": 1.0, "time/update/seconds": 1.5}
    return row | dict.fromkeys(metrics, step / 10)


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
