"""How the peak memory of one update grows with completion length, vocabulary and teacher size.

    python benchmarks/memory.py               about a dozen cases, a fresh process each
    python benchmarks/memory.py --lengths 256 1024 8192 --json memory.json

Bytes are resident memory beyond what the process held before: weights of student and teacher,
gradient and both moments of Adam are there by then (an update was made), so what is left is what
teacher scoring and the update need on top. One row of `prompt + length` tokens goes through the
model at a time. `all logits` is the same update without rlad's tiles. Linux only.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replay import EOS, Case, prompt_text, scripted_completions
from step_engines import environment, make_engine

from rlad.engines.native.loop import NativeEngine
from rlad.engines.rollout_batch import RolloutBatch
from rlad.rollouts.types import Completion, Rollout, RolloutGroup
from rlad.tasks import Problem
from rlad.teachers.local import LocalTeacher

BASE = Case(lengths="equal", max_tokens=512, num_prompts=1, group_size=2)
SMALL = 16
"""completion tokens of the update before the measured one"""


def batch_of(engine: NativeEngine, case: Case, tokens: int) -> RolloutBatch:
    """Every rollout has `tokens` tokens and an advantage that is not 0."""
    groups = []
    completions = [[*row[: tokens - 1], EOS] for row in scripted_completions(case, 0)]
    for i in range(case.num_prompts):
        prompt = prompt_text(case, i)
        size = case.group_size
        rollouts = [
            Rollout(Completion(tuple(row), (0.0,) * tokens, False), "", "correct", 1.0)
            for row in completions[i * size : (i + 1) * size]
        ]
        ids = engine.student.tokenizer(prompt)["input_ids"]
        groups.append(RolloutGroup(i, Problem(prompt, "", str(i)), tuple(ids), tuple(rollouts)))
    return RolloutBatch(0, groups, torch.tensor([1.0, -1.0]).repeat(case.num_rows // 2))


def resident() -> int:
    """Bytes, after what was freed has been given back; the peak starts again from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(key: str) -> int:
    """Bytes of an entry of `/proc/self/status`, such as the peak `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure_here(case: Case, without: str) -> dict[str, int]:
    """Bytes that teacher scoring and update need on top of `weights`: those of the student, four
    times, and the teacher's."""
    torch.set_num_threads(case.threads)
    case = replace(case, tokens_per_batch=case.prompt_tokens + case.max_tokens)
    engine = make_engine(case, num_steps=2, without=without)
    assert isinstance(engine.teacher, LocalTeacher)
    prompts = range(case.num_prompts)
    found = {
        "weights": 4 * _num_bytes(engine.student.model) + _num_bytes(engine.teacher.scorer.model)
    }
    for tokens in (SMALL, case.max_tokens):
        batch = batch_of(engine, case, tokens)
        before = resident()
        batch.teacher_logprobs = batch.by_rollout(engine._ask_teacher(batch), batch.teacher_rows)
        found["teacher"] = status_bytes("VmHWM") - before
        before = resident()
        engine.update(batch, prompts)
        found["update"] = status_bytes("VmHWM") - before
    return found


def _num_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure(case: Case, without: str = "") -> dict[str, int]:
    """`measure_here` in a fresh process, whose allocator gives freed memory back at once."""
    command = [
        sys.executable,
        __file__,
        "--child",
        json.dumps({"case": asdict(case), "without": without}),
    ]
    variables = {
        **os.environ,
        **dict(environment()),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def series(options: argparse.Namespace) -> dict[str, list[tuple[int, Case, str]]]:
    """By what varies: its value, the case, and the measure that is switched off."""
    base = replace(
        BASE, max_tokens=options.length, hidden=options.hidden, teacher_hidden=options.hidden
    )
    chosen = {
        "completion tokens": [(n, replace(base, max_tokens=n), "") for n in options.lengths],
        "vocabulary": [(v, replace(base, vocabulary=v), "") for v in options.vocabularies],
        "vocabulary, all logits": [
            (v, replace(base, vocabulary=v), "tiles") for v in options.vocabularies
        ],
        "teacher hidden size": [
            (h, replace(base, teacher_hidden=h), "") for h in options.teacher_hidden
        ],
    }
    return {name: cases for name, cases in chosen.items() if cases}


def fit(values: Sequence[int], peaks: Sequence[int]) -> dict[str, float]:
    """Of peak = start + slope x value: both, the share of the variance that this explains, and
    greatest / least peak."""
    slope, start = np.polyfit(values, peaks, 1) if len(values) > 1 else (0.0, float(peaks[0]))
    residual = np.asarray(peaks) - (start + slope * np.asarray(values))
    explained = 1 - residual.var() / np.var(peaks) if np.var(peaks) else 1.0
    return {
        "bytes_at_0": start,
        "bytes_per_unit": slope,
        "explained": explained,
        "greatest_to_least": max(peaks) / min(peaks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--length",
        type=int,
        default=BASE.max_tokens,
        help="completion tokens where something else varies",
    )
    parser.add_argument("--hidden", type=int, default=BASE.hidden, help="of the student")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048])
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[1000, 50_000, 150_000])
    parser.add_argument("--teacher-hidden", type=int, nargs="*", default=[192, 384, 768])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        told = json.loads(options.child)
        print(json.dumps(measure_here(Case(**told["case"]), told["without"])))
        return
    results: dict[str, Any] = {}
    for name, cases in series(options).items():
        print(
            f"| {name} | weights, gradient, Adam MB | teacher scoring MB | update MB |\n| ---: | "
            "---: | ---: | ---: |"
        )
        rows = []
        for value, case, without in cases:
            rows.append({"value": value, **measure(case, without)})
            figures = " | ".join(
                f"{rows[-1][key] / 1e6:.1f}" for key in ("weights", "teacher", "update")
            )
            print(f"| {value} | {figures} |", flush=True)
        values = [row["value"] for row in rows]
        fits = {part: fit(values, [row[part] for row in rows]) for part in ("teacher", "update")}
        for part, found in fits.items() if len(values) > 1 else ():
            print(
                f"\n{part}: {found['bytes_at_0'] / 1e6:.1f} MB + {found['bytes_per_unit']:.0f} "
                "bytes each "
                f"(explains {found['explained']:.1%}); greatest / least "
                f"{found['greatest_to_least']:.2f}"
            )
        print()
        results[name] = {"rows": rows, "fits": fits}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
