"""How long a training step takes with each sampler: our own decoder and vLLM, in one process and in
turns, TRRD with a local teacher.

    python benchmarks/samplers.py --model smollm2-135m --max-tokens 128

Needs vLLM (`.ci/vllm-environment`). Both engines train the same student on the same prompts, and
take turns step by step, so what else the machine does meets both. They draw other completions, so
seconds are also given for 1,000 sampled tokens. The first round is a warm-up and not counted.
Afterwards the log-probs that vLLM gave the last batches' tokens are compared with the trainer's.

    python benchmarks/samplers.py --only vllm --rounds 20 \\
        --num-prompts 2 --group-size 4 --max-tokens 32

only compares vLLM's log-probs with the trainer's, after each of 20 updates.

    python benchmarks/samplers.py --trl

compares TRL's trainer, which samples by transformers, with our engine; it needs no vLLM.

    python benchmarks/samplers.py --url http://127.0.0.1:8000

compares a vLLM server of the model (docs/rollouts.md) that writes each batch when it is asked for
with the same one batch ahead. They run one after the other, as a server holds one student; the
seconds of a part are those that the trainer spent on it or waited for it. Needs no vLLM here.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from queue import Queue
from statistics import median
from threading import Semaphore, Thread
from typing import Any

# Before torch is imported: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from rlad.checks.trial import with_alternating_verdicts
from rlad.config.run import RunConfig
from rlad.engines.base import StepResult
from rlad.engines.making import load_engine_student, make_engine
from rlad.tasks import make_task

PARTS = ("generation", "hand_over", "teacher", "update")
Row = dict[str, float]


def samplers(url: str | None, *, trl: bool = False) -> dict[str, dict[str, Any]]:
    """Return the settings of [rollout] that are compared, the first with the second."""
    if trl:
        return {"trl": {}, "native": {}}
    if url is None:
        return {"vllm": {"engine": "vllm"}, "native": {"engine": "native"}}
    server = {"engine": "vllm", "vllm": {"urls": [url]}}
    return {"ahead": server | {"max_staleness": 1}, "server": server}


def config_of(sampler: str, options: argparse.Namespace) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": options.model, "dtype": options.dtype},
            "teacher": {"model": options.model, "dtype": options.dtype},
            "task": {"type": "knights_and_knaves"},
            "engine": {"type": "trl" if sampler == "trl" else "native"},
            "rollout": {
                **samplers(options.url, trl=options.trl)[sampler],
                "prompts_per_batch": options.num_prompts,
                "group_size": options.group_size,
                "max_prompt_tokens": 256,
                "max_completion_tokens": options.max_tokens,
                "max_batch_rows": options.num_prompts * options.group_size,
            },
            "optimization": {
                "num_steps": options.rounds + 2,  # one batch ahead of the last that is measured
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
    title = "Median seconds for 1,000 sampled tokens:"
    if len(rows) < 2:
        return "\n".join([title, "", *lines])
    one, other = rows
    ratios = [
        f"{per_1000_tokens(rows[one], part) / per_1000_tokens(rows[other], part):.2f}"
        for part in ("generation", "teacher", "update", "step")
    ]
    return "\n".join(
        [title, "", *lines, "", f"{one} / {other}: generation, teacher, update, step {ratios}"]
    )


def make(sampler: str, options: argparse.Namespace) -> Any:
    """Make the engine of a run with one sampler."""
    config = config_of(sampler, options)
    # Every second completion counts as correct, so that all are scored and trained on.
    task = with_alternating_verdicts(make_task(**config.task.model_dump()))
    return make_engine(config, load_engine_student(config, None), task, before_work=lambda: None)


def steps_of(engine: Any) -> Iterator[StepResult]:
    """Yield the steps of an engine, which works in a thread of its own and waits between them."""
    results: Queue[StepResult | BaseException] = Queue()
    turn = Semaphore(0)

    def after_step(result: StepResult) -> bool:
        results.put(result)
        turn.acquire()
        return True

    def run() -> None:
        try:
            engine.run(after_step)
        except BaseException as error:
            results.put(error)

    Thread(target=run, daemon=True).start()
    while True:
        result = results.get()
        if isinstance(result, BaseException):
            raise result
        yield result
        turn.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--trl", action="store_true", help="compare TRL's trainer with our engine")
    parser.add_argument("--url", help="of a vLLM server of the model")
    parser.add_argument("--only", metavar="SAMPLER", help="leave out the other one")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    print(f"{options.model}, {options.dtype}, {torch.get_num_threads()} threads", flush=True)
    names = list(samplers(options.url, trl=options.trl))
    if options.only and options.only not in names:
        parser.error(f"--only {options.only}: choose {' or '.join(names)}")
    names = [options.only] if options.only else names
    turns = [names] if options.url is None else [[name] for name in names]
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for together in turns:
        with ExitStack() as held:
            engines = {name: held.enter_context(closing(make(name, options))) for name in together}
            steps = {name: steps_of(engine) for name, engine in engines.items()}
            for number in range(options.rounds + 1):
                for name in together:
                    row = row_of(next(steps[name]))
                    if number:
                        rows[name].append(row)
                    shown = {key: round(value, 6) for key, value in row.items()}
                    print(number, name, shown, flush=True)
    print(table(rows))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
