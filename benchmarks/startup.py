"""How long the command line takes to start: wall and processor time of `rlad --help`, `rlad list
objectives` and `rlad check`, with and without its trial of the models.

    python benchmarks/startup.py --repetitions 10 --json startup.json

Medians of several runs, one after the other, files cached by an uncounted one. Processor time
hardly depends on what else the machine does, wall time does. `python -X importtime -m rlad check
--without-models` says which import takes the time.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

COMMANDS = {
    "rlad --help": 0.3,
    "rlad list objectives": None,
    "rlad check --without-models": 1.0,
    "rlad check": None,
}
"""command: what its processor time is to stay below, seconds"""
PARTS = {
    "import torch": "import torch",
    "import transformers' models": "from transformers import AutoModelForCausalLM",
}
"""what a command that loads models cannot be faster than"""


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print("| command | wall s | processor s | limit of processor s |\n| --- | ---: | ---: | ---: |")
    results = {}
    runs = {name: (["-m", *name.split()], limit) for name, limit in COMMANDS.items()}
    for name, (arguments, limit) in (
        runs | {name: (["-c", code], None) for name, code in PARTS.items()}
    ).items():
        times = [seconds(arguments) for _ in range(options.repetitions + 1)][1:]
        results[name] = {
            "wall": [wall for wall, _ in times],
            "processor": [used for _, used in times],
            "limit": limit,
        }
        print(
            f"| {name} | {median(results[name]['wall']):.2f} | "
            f"{median(results[name]['processor']):.2f} | {limit or ''} |"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
