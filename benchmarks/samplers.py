"""How long a training step takes with two samplers, in one process and in turns, TRRD with a local
teacher.

    python benchmarks/samplers.py vllm native --model smollm2-135m --max-tokens 128

compares vLLM (`.ci/vllm-environment`) with our own decoder. `trl` is TRL's trainer, which samples
by transformers, and `trl-vllm` is TRL's with vLLM in its process. Both engines train the same
student on the same prompts, and take turns step by step, so what else the machine does meets both.
They draw other completions, so seconds are also given for 1,000 sampled tokens. The first round is
a warm-up and not counted. Last, vLLM's log-probs are compared with the trainer's.

On the CPU, vLLM packs its weights for oneDNN and throws the plain ones away, so that TRL could not
load new ones. There vLLM works without oneDNN if `trl-vllm` is compared.

    python benchmarks/samplers.py vllm --rounds 20 \\
        --num-prompts 2 --group-size 4 --max-tokens 32

only compares vLLM's log-probs with the trainer's, after each of 20 updates.

    python benchmarks/samplers.py ahead server --url http://127.0.0.1:8000

compares a vLLM server of the model (docs/rollouts.md) that writes each batch one batch ahead with
the same when it is asked for. They run one after the other, as a server holds one student; the
seconds of a part are those that the trainer spent on it or waited for it. Needs no vLLM here.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec
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
from rlad.rollouts.vllm_sampler import prepare_environment
from rlad.tasks import make_task

SAMPLERS = ("native", "vllm", "server", "ahead", "trl", "trl-vllm")
MAX_PROMPT_TOKENS = 256
PARTS = ("generation", "hand_over", "teacher", "update")
Row = dict[str, float]


def settings_of(sampler: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the sections of a run that make it sample so."""
    server = {"engine": "vllm", "vllm": {"urls": [options.url]}}
    trl_vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": MAX_PROMPT_TOKENS + options.max_tokens,
    }
    return {
        "native": {},
        "vllm": {"rollout": {"engine": "vllm"}},
        "server": {"rollout": server},
        "ahead": {"rollout": server | {"max_staleness": 1}},
        "trl": {"engine": {"type": "trl"}},
        "trl-vllm": {"engine": {"type": "trl", "trl": trl_vllm}},
    }[sampler]


def config_of(sampler: str, options: argparse.Namespace) -> RunConfig:
    sections = settings_of(sampler, options)
    return RunConfig.model_validate(
        {
            "student": {"model": options.model, "dtype": options.dtype},
            "teacher": {"model": options.model, "dtype": options.dtype},
            "task": {"type": "knights_and_knaves"},
            "engine": sections.get("engine", {}),
            "rollout": {
                **sections.get("rollout", {}),
                "prompts_per_batch": options.num_prompts,
                "group_size": options.group_size,
                "max_prompt_tokens": MAX_PROMPT_TOKENS,
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


def let_trl_load_weights() -> None:
    """Before vLLM starts: keep its engine in this process, and its weights unpacked on the CPU."""
    prepare_environment()
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "samplers", nargs="+", metavar="SAMPLER", choices=SAMPLERS, help="one or two"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--url", help="of a vLLM server of the model")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    print(f"{options.model}, {options.dtype}, {torch.get_num_threads()} threads", flush=True)
    names = options.samplers
    servers = {"server", "ahead"} & set(names)
    if "trl-vllm" in names and find_spec("vllm") is None:
        parser.error("trl-vllm needs vLLM in this environment (.ci/vllm-environment)")
    if len(names) > 2 or (servers and not options.url):
        parser.error("give one or two samplers, and the --url of a server")
    if {"vllm", "trl-vllm"} <= set(names):
        parser.error("vllm and trl-vllm cannot be in one process; compare each with native")
    turns = [[name] for name in names] if servers else [names]
    if "trl-vllm" in names:
        let_trl_load_weights()
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
