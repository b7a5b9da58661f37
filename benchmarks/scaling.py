"""Time per step of one run in 1 and in 2 processes on this CPU (DDP over gloo, 1 thread each), turn
and turn about.

python benchmarks/scaling.py [--rounds 3] [--steps 5] [--tokens 64] [--prompts 8] [--group-size 8]

The embedded student and teacher, TRRD on knights and knaves. Of each run the first step (warm-up)
and all evaluation are left out; what remains are the seconds between two steps, rollouts, teacher
and update, by the slower rank. The ratio is formed in each round; 2 would be perfect. What is
trained is the same in both (tests/engines/test_launch.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PARTS = ("generation", "teacher", "update")


def settings(options: argparse.Namespace, run_dir: Path) -> list[str]:
    return [
        f"run_dir={run_dir}",
        "engine.type=trl",
        "student.device=cpu",
        f"rollout.prompts_per_batch={options.prompts}",
        f"rollout.group_size={options.group_size}",
        f"rollout.max_completion_tokens={options.tokens}",
        f"optimization.num_steps={options.steps}",
        f"evaluation.every_steps={options.steps}",
        *(f"evaluation.num_{split}_problems=2" for split in ("validation", "test")),
    ]


def steps_of(processes: int, options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Seconds of each step but the first, by part and in all."""
    command = [sys.executable, "-m", "rlad", "train", *settings(options, folder / "run")]
    command += ["--launch", "ddp", "--num-processes", str(processes)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    rows = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ][1:]
    return [
        {part: float(row.get(f"time/{part}/seconds", 0)) for part in PARTS}
        | {"step": sum(value for key, value in row.items() if key.startswith("time/"))}
        for row in rows
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("rounds", 3),
        ("steps", 5),
        ("tokens", 64),
        ("prompts", 8),
        ("group-size", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print(
        f"load {os.getloadavg()[0]:.2f}, cores {os.cpu_count()}; {options.prompts} x "
        f"{options.group_size} completions a step"
    )
    steps: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    ratios = []
    for number in range(options.rounds):
        medians = {}
        for processes in (1, 2) if number % 2 == 0 else (2, 1):
            with TemporaryDirectory() as folder:
                found = steps_of(processes, options, Path(folder))
            steps[processes] += found
            medians[processes] = statistics.median(step["step"] for step in found)
        ratios.append(medians[1] / medians[2])
        print(
            f"round {number + 1}: {medians[1]:.2f} s / {medians[2]:.2f} s = {ratios[-1]:.2f}; load "
            f"{os.getloadavg()[0]:.2f}"
        )
    print("\nseconds a step, median [least, most]")
    for processes, found in steps.items():
        parts = "   ".join(
            f"{part} {spread([step[part] for step in found])}" for part in ("step", *PARTS)
        )
        print(f"{processes} process{'es' if processes > 1 else '  '}   {parts}")
    print(f"one / two processes: {spread(ratios)}")


if __name__ == "__main__":
    main()
