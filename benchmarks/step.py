"""How long one training step takes: rlad's TRRD with its teacher beside stock TRL, on the same
completions.

    python benchmarks/step.py              the cases that matter, minutes on two idle cores
    python benchmarks/step.py --measures   rlad without each of its measures
    python benchmarks/step.py --full       all vocabularies, lengths, zero-variance shares: hours
    python benchmarks/step.py --max-tokens 256 2048 --zero-variance 0.3 --json step.json

Every engine has a process of its own and they take turns step by step (A B C A B C ...), one at a
time, so what else the machine does meets all of them. The ratio is that of rlad's step to the
other's in the same round, its spread over the rounds. The first round is a warm-up and not counted.
Processor time hardly depends on what else the machine does, wall time does. How completions are
replayed: `replay.py`; how TRL is set up: `step_engines.py`.
"""

import argparse
import json
import multiprocessing
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from replay import Case, completion_lengths
from step_engines import ENGINES, MEASURES, PARTS, environment, work

STOCK = ("rlad trrd", "rlad grpo", "trl grpo", "trl grpo beta", "trl distillation")
WITHOUT = ("rlad trrd", *(f"rlad trrd without {name}" for name in MEASURES))
FULL = {
    "vocabulary": [1000, 50_000, 150_000],
    "max_tokens": [256, 1024, 2048, 8192],
    "zero_variance": [0.0, 0.3, 0.6],
}
Rounds = dict[str, list[dict[str, float]]]


def measure(case: Case, engines: Sequence[str], repetitions: int) -> Rounds:
    """The seconds of each engine's steps, round by round, without the warm-up."""
    context = multiprocessing.get_context("spawn")
    pipes = {engine: context.Pipe() for engine in engines}
    workers = [
        context.Process(
            target=work, args=(engine, case, repetitions + 1, pipes[engine][1]), daemon=True
        )
        for engine in engines
    ]
    for worker, (_, theirs) in zip(workers, pipes.values(), strict=True):
        worker.start()
        theirs.close()  # so that a worker that dies ends our wait
    rounds: Rounds = {engine: [] for engine in engines}
    for _ in range(repetitions + 1):
        # All wait before any of them starts: what they do between their steps disturbs nobody's
        # step.
        for engine in engines:
            assert pipes[engine][0].recv() == "ready"
        for engine in engines:
            pipes[engine][0].send("go")
            rounds[engine].append(pipes[engine][0].recv())
    for worker in workers:
        worker.join()
    return {engine: seconds[1:] for engine, seconds in rounds.items()}


def ratios(rounds: Rounds, ours: str, theirs: str, of: str = "total") -> list[float]:
    """Of wall time (`total`) or of `processor` time, round by round."""
    return [a[of] / b[of] for a, b in zip(rounds[ours], rounds[theirs], strict=True)]


def table(case: Case, rounds: Rounds, ours: str) -> str:
    lengths = completion_lengths(case, 1)
    lines = [
        f"### {case.title}",
        "",
        f"Mean length {sum(lengths) / len(lengths):.0f}. Seconds are medians of "
        f"{len(rounds[ours])} rounds; "
        f"ratio: {ours} / engine, median (least to greatest), of wall and of processor time; peak: "
        "the process in memory.",
        "",
        f"| engine | step | {' | '.join(PARTS)} | ratio | processor ratio | peak MB |",
        f"| --- |{' ---: |' * (len(PARTS) + 4)}",
    ]
    for engine, steps in rounds.items():
        parts = [f"{median(step[part] for step in steps):.2f}" for part in ("total", *PARTS)]
        for of in ("total", "processor"):
            values = ratios(rounds, ours, engine, of)
            parts.append(f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {engine} | {' | '.join(parts)} | {steps[-1]['peak_bytes'] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def cases_of(options: argparse.Namespace) -> list[Case]:
    shape = {
        name: getattr(options, name)
        for name in (
            "num_prompts",
            "group_size",
            "prompt_tokens",
            "hidden",
            "layers",
            "family",
            "tokens_per_batch",
            "threads",
        )
    }
    shape["teacher_hidden"] = options.teacher_hidden or options.hidden
    shape["teacher_layers"] = options.teacher_layers or options.layers
    shapes = product(options.vocabulary, options.max_tokens, options.lengths, options.zero_variance)
    cases = [
        Case(vocabulary=v, max_tokens=m, lengths=kind, zero_variance=z, **shape)
        for v, m, kind, z in shapes
    ]
    if options.is_default:  # equal lengths are asked for at share 0 alone
        cases = [case for case in cases if case.lengths == "long_tail" or case.zero_variance == 0]
    return cases


def machine(threads: int) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "trl")},
    }


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Case()
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[default.vocabulary])
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[default.max_tokens])
    parser.add_argument("--lengths", nargs="+", choices=["long_tail", "equal"])
    parser.add_argument("--zero-variance", type=float, nargs="+")
    for name in (
        "num_prompts",
        "group_size",
        "prompt_tokens",
        "hidden",
        "layers",
        "tokens_per_batch",
        "threads",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--teacher-hidden", type=int, help="default: as the student")
    parser.add_argument("--teacher-layers", type=int, help="default: as the student")
    parser.add_argument(
        "--family", default=default.family, help="model type of transformers, such as llama"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=list(ENGINES),
        default=list(STOCK),
        help="the first is compared",
    )
    parser.add_argument(
        "--measures", action="store_true", help="rlad with and without each of its measures"
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.is_default = options.lengths is None and options.zero_variance is None
    options.lengths = options.lengths or (
        ["long_tail"] if options.measures else ["long_tail", "equal"]
    )
    options.zero_variance = options.zero_variance or (
        [0.3] if options.measures else [0.0, 0.3, 0.6]
    )
    if options.measures:
        options.engines = list(WITHOUT)
    if options.full:
        vars(options).update(FULL)
    return options


def main() -> None:
    options = parsed()
    os.environ.update(environment())
    results: dict[str, Any] = {"machine": machine(options.threads), "cases": []}
    print(
        ", ".join(f"{name} {value}" for name, value in results["machine"].items()) + "\n",
        flush=True,
    )
    for case in cases_of(options):
        rounds = measure(case, options.engines, options.repetitions)
        print(table(case, rounds, options.engines[0]), flush=True)
        ours, *others = options.engines
        compared = {
            o: {of: ratios(rounds, ours, o, of) for of in ("total", "processor")} for o in others
        }
        results["cases"].append({"case": asdict(case), "rounds": rounds, "ratios": compared})
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
