"""The embedded default under several objectives and seeds: `python benchmarks/default_runs.py --out
runs/default`.

Trains each missing run through `rlad.train`, then prints one table row per run and one per
objective, and writes all rows as JSONL. The before/after difference of a run is over the same test
problems with the same sampling seeds.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import rlad
from rlad.runs.directory import EVAL, METRICS, RunDirectory

SHOWN = {
    "gated +": "objective/gated_positive/frac",
    "gated -": "objective/gated_negative/frac",
    "clamped": "objective/clamped/frac",
    "scored": "objective/scored_completions/frac",
}


def row_of(run: RunDirectory, objective: str, seed: int) -> dict[str, Any]:
    """The figures of one finished run."""
    tests = [row for row in run.read(EVAL) if row["split"] == "test"]
    metrics = list(run.read(METRICS))
    seconds = {
        part: sum(m.get(f"time/{part}/seconds", 0.0) for m in metrics)
        for part in ("generation", "teacher", "update")
    }
    return {
        "objective": objective,
        "seed": seed,
        "before": tests[0]["pass@1"],
        "after": tests[-1]["pass@1"],
        "first_20_steps": {
            name: mean(m.get(key, 0.0) for m in metrics[:20]) for name, key in SHOWN.items()
        },
        "all_steps": {name: mean(m.get(key, 0.0) for m in metrics) for name, key in SHOWN.items()},
        "completion_tokens": [
            metrics[0]["rollout/completion_tokens/mean"],
            metrics[-1]["rollout/completion_tokens/mean"],
        ],
        "entropy": [
            metrics[0].get("student/entropy/mean"),
            metrics[-1].get("student/entropy/mean"),
        ],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run directories and of results.jsonl"
    )
    parser.add_argument("--objectives", nargs="+", default=["trrd", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--overrides", nargs="*", default=[], help="KEY=VALUE for every run")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        for objective in arguments.objectives:
            path = arguments.out / f"{objective}-seed{seed}"
            if not (path / "README.md").is_file():
                overrides = [
                    f"objective={objective}",
                    f"seed={seed}",
                    f'run_dir="{path}"',
                    *arguments.overrides,
                ]
                rlad.train(
                    rlad.load_config(overrides=overrides), resume=(path / "config.toml").is_file()
                )
            rows.append(row_of(RunDirectory(path), objective, seed))
            print(f"{objective} seed {seed}: done", flush=True)
    print(
        f"\n| objective | seed | test before | test after | {' | '.join(SHOWN)} | seconds "
        f"|\n|{' --- |' * (5 + len(SHOWN))}"
    )
    print("\n".join(describe(row) for row in rows) + "\n")
    for objective in arguments.objectives:
        gains = [
            r["after"]["mean"] - r["before"]["mean"] for r in rows if r["objective"] == objective
        ]
        after = [r["after"]["mean"] for r in rows if r["objective"] == objective]
        spread = f" (sd {stdev(after):.1%} over {len(after)} seeds)" if len(after) > 1 else ""
        print(
            f"{objective}: after {mean(after):.1%}{spread}, gain {mean(gains):+.1%}, least "
            f"{min(gains):+.1%}"
        )
    (arguments.out / "results.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


def describe(row: dict[str, Any]) -> str:
    before, after = (
        f"{row[k]['mean']:.1%} [{row[k]['low']:.1%}, {row[k]['high']:.1%}]"
        for k in ("before", "after")
    )
    shares = " | ".join(f"{value:.1%}" for value in row["all_steps"].values())
    seconds = sum(row["seconds"].values())
    name = f"{row['objective']} | {row['seed']}"
    return f"| {name} | {before} | {after} | {shares} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
