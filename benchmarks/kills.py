"""How many kills a run survives: SIGKILL at random moments of every phase, resumed each time,
compared bit for bit at the end.

    python benchmarks/kills.py                   20 kills of each of two kinds of run, on one core
    python benchmarks/kills.py --kills 100 --seed 7 --json kills.json

The runs train the embedded student for 24 steps: with one optimiser step on each rollout batch, and
with four (so that checkpoints lie within a batch), a KL leash, an annealed alpha, a schedule and a
moving teacher. Kills are shared out among the phases; in which one fell is read, when the process
is dead, from memory that it shared. Each run is compared with one of the same seed that was left
alone: weights, optimiser, teacher, pending rollouts, metrics (but for time and memory), evaluations
and samples. The exit code is 1 when anything differs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from killed_runs import PHASES, kill_and_compare

COMMON: dict[str, Any] = {
    "student": {"model": "embedded/student"},
    "teacher": {"model": "embedded/teacher"},
    "task": {
        "type": "knights_and_knaves",
        "num_people": [2],
        "instructions": False,
        "vary_names": False,
    },
    "rollout": {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 24},
    "optimization": {"num_steps": 24, "learning_rate": 3e-4},
    "evaluation": {"every_steps": 3, "num_validation_problems": 6, "num_test_problems": 6},
}
FOUR_STEPS: dict[str, Any] = {
    "teacher": {"type": "ema", "update_rate": 0.1},
    "objective": {"type": "trrd", "alpha": {"start": 0.9, "end": 0.3, "change_per_step": -0.05}},
    "optimization": {
        "num_steps": 24,
        "learning_rate": 3e-4,
        "steps_per_rollout_batch": 4,
        "kl_coef": 0.05,
        "schedule": "cosine",
        "warmup_steps": 2,
    },
    "checkpoints": {"every_seconds": 1.0},
}
RUNS = {"one step per rollout batch": {}, "four steps per rollout batch": FOUR_STEPS}


def config_of(sections: dict[str, Any]) -> Callable[[Path, int], dict[str, Any]]:
    return lambda run_dir, seed: COMMON | sections | {"run_dir": str(run_dir), "seed": seed}


def measure(kills: int, seed: int) -> list[dict[str, Any]]:
    """One row for each kind of run."""
    rows = []
    phases = [list(PHASES)[i % len(PHASES)] for i in range(kills)]
    for name, sections in RUNS.items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            runs = list(
                kill_and_compare(config_of(sections), Path(folder), phases=phases, seed=seed)
            )
        fell = [kill for _, killed, _ in runs for kill in killed]
        rows.append(
            {
                "run": name,
                "kills": [asdict(kill) for kill in fell],
                "by_phase": Counter(kill.phase for kill in fell),
                "runs": len(runs),
                "runs_that_differ": {
                    number: differing for number, _, differing in runs if differing
                },
                "seconds": time.monotonic() - started,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    phases = sorted(
        {phase for row in rows for phase in row["by_phase"]},
        key=lambda phase: [*PHASES, phase].index(phase),
    )
    lines = [
        f"| killed while | {' | '.join(row['run'] for row in rows)} |",
        f"| --- |{' ---: |' * len(rows)}",
    ]
    lines += [
        f"| {phase} | {' | '.join(str(row['by_phase'][phase]) for row in rows)} |"
        for phase in phases
    ]
    lines.append(f"| all | {' | '.join(str(len(row['kills'])) for row in rows)} |")
    lines.append(f"| runs compared | {' | '.join(str(row['runs']) for row in rows)} |")
    lines.append(
        "| runs that differ in a bit | "
        f"{' | '.join(str(len(row['runs_that_differ'])) for row in rows)} |"
    )
    lines.append(f"| seconds | {' | '.join(format(row['seconds'], '.0f') for row in rows)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all kills and figures")
    arguments = parser.parse_args()
    rows = measure(arguments.kills, arguments.seed)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        for number, differing in row["runs_that_differ"].items():
            print(f"{row['run']}, seed {number}: {', '.join(differing)}")
    sys.exit(any(row["runs_that_differ"] for row in rows))


if __name__ == "__main__":
    main()
