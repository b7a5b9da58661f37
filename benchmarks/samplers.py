"""How long a training step takes with each sampler: our own decoder and vLLM, in one process and in
turns, TRRD with a local teacher.

    python benchmarks/samplers.py --model smollm2-135m --max-tokens 128

Needs vLLM (`.ci/vllm-environment`). Both engines train the same student on the same prompts, and
take turns step by step, so what else the machine does meets both. They draw other completions, so
seconds are also given for 1,000 sampled tokens. The first round is a warm-up and not counted.
Afterwards the log-probs that vLLM gave the last batches' tokens are compared with the trainer's.
"""

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import closing
from statistics import median
from typing import Any

# Before torch is imported: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from rlad.checks.trial import with_alternating_verdicts
from rlad.config.run import RunConfig
from rlad.engines.base import StepResult
from rlad.engines.native import make_engine
from rlad.models.student import load_student
from rlad.tasks import make_task

PARTS = ("generation", "hand_over", "teacher", "update")
Row = dict[str, float]


def config_of(sampler: str, options: argparse.Namespace) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": options.model, "dtype": options.dtype},
            "teacher": {"model": options.model, "dtype": options.dtype},
            "task": {"type": "knights_and_knaves"},
            "rollout": {
                "engine": sampler,
                "prompts_per_batch": options.num_prompts,
                "group_size": options.group_size,
                "max_prompt_tokens": 256,
                "max_completion_tokens": options.max_tokens,
                "max_batch_rows": options.num_prompts * options.group_size,
            },
            "optimization": {
                "num_steps": options.rounds + 1,
                "learning_rate": options.learning_rate,
                "tokens_per_batch": 4096,
            },
        }
    )


def row_of(result: StepResult) -> Row:
    seconds = {part: result.metrics.get(f"time/{part}/seconds", 0.0) for part in PARTS}
    rollouts = [rollout for group in result.groups for rollout in group.rollouts]
    return seconds | {
        "step": sum(seconds.values()),
        "tokens": float(sum(len(rollout.completion.token_ids) for rollout in rollouts)),
        "mismatch": result.metrics.get("sampler/mismatch/mean", float("nan")),
        "largest": result.metrics.get("sampler/mismatch/max", float("nan")),
    }


def per_1000_tokens(rows: Sequence[Row], part: str) -> float:
    return median(1000 * row[part] / row["tokens"] for row in rows)


def table(rows: dict[str, list[Row]]) -> str:
    lines = [
        "| sampler | tokens a step | " + " | ".join((*PARTS, "step")) + " | mismatch mean, max |",
        "| --- |" + " ---: |" * (len(PARTS) + 3),
    ]
    for name, found in rows.items():
        figures = [f"{per_1000_tokens(found, part):.2f}" for part in (*PARTS, "step")]
        tokens = median(row["tokens"] for row in found)
        mismatch = median(row["mismatch"] for row in found)
        largest = max(row["largest"] for row in found)
        lines.append(
            f"| {name} | {tokens:.0f} | {' | '.join(figures)} | {mismatch:.1e}, {largest:.1e} |"
        )
    ratios = [
        f"{per_1000_tokens(rows['vllm'], part) / per_1000_tokens(rows['native'], part):.2f}"
        for part in ("generation", "step")
    ]
    title = "Median seconds for 1,000 sampled tokens:"
    return "\n".join([title, "", *lines, "", f"vllm / native: generation, step {ratios}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    print(f"{options.model}, {options.dtype}, {torch.get_num_threads()} threads", flush=True)
    rows: dict[str, list[Row]] = {"native": [], "vllm": []}
    engines: dict[str, Any] = {}
    for name in rows:
        config = config_of(name, options)
        # Every second completion counts as correct, so that all are scored and trained on.
        task = with_alternating_verdicts(make_task(**config.task.model_dump()))
        engines[name] = make_engine(config, load_student(config), task, before_work=lambda: None)
    with closing(engines["native"]), closing(engines["vllm"]):
        steps = {name: engine.steps() for name, engine in engines.items()}
        for number in range(options.rounds + 1):
            for name in rows:
                row = row_of(next(steps[name]))
                if number:
                    rows[name].append(row)
                print(
                    number, name, {key: round(value, 6) for key, value in row.items()}, flush=True
                )
    print(table(rows))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
