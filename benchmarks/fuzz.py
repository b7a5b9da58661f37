"""Hostile text against everything of rlad's that reads text: at least 100,000 inputs; prints a
table.

    python benchmarks/fuzz.py                        # hypothesis: inputs made to be hostile
    python benchmarks/fuzz.py --coverage-seconds 20  # and atheris (rlad[fuzz])

Targets, inputs and checks are those of `tests/hostile_targets.py`, which the tests try with fewer
inputs. A finding is an error that is not the documented `ValueError`, an input that takes longer
than 20 seconds, or a wrong "correct": for puzzles the true roles are known, for numbers, formulas
and other answers what they were written from. The exit code is 1 when there is one.
"""

import argparse
import contextlib
import importlib.util
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hypothesis import HealthCheck, given, seed, settings

HANG_SECONDS = 20
IN_PROCESSES_OF_THEIR_OWN = ("math", "math, written", "math, classes", "math, any text")
"""which coverage cannot see"""


def fuzz(name: str, num_inputs: int, first_seed: int) -> tuple[int, float, float, str]:
    """Inputs tried, seconds, seconds of the slowest, and the first finding, as small as hypothesis
    could make it."""
    from hostile_targets import TARGETS

    target = TARGETS[name]
    counts = {"inputs": 0, "slowest": 0.0}

    def check(example: Any) -> None:
        counts["inputs"] += 1
        began = time.perf_counter()
        signal.alarm(HANG_SECONDS)
        try:
            target.check(example)
        finally:
            signal.alarm(0)
            counts["slowest"] = max(counts["slowest"], time.perf_counter() - began)

    # Inputs that a strategy filters out do not count: some more examples than wanted.
    profile = settings(
        max_examples=num_inputs,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    started = time.perf_counter()
    finding = ""
    try:
        seed(first_seed)(profile(given(target.inputs)(check)))()
    except Exception:
        finding = traceback.format_exc()
    return int(counts["inputs"]), time.perf_counter() - started, counts["slowest"], finding


def fuzz_by_coverage(name: str, seconds: int) -> None:
    """Ends the process; libFuzzer writes what it found to stderr."""
    import atheris

    with atheris.instrument_imports(include=["rlad"]):
        from hostile_targets import TARGETS

    target = TARGETS[name]
    one: Any = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(target.inputs)(target.check)
    )
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={HANG_SECONDS}",
        "-max_len=4096",
        f"-artifact_prefix={tempfile.mkdtemp()}/",
    ]
    atheris.Setup([sys.argv[0], *options], one.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def coverage_process(name: str, seconds: int) -> tuple[int, float, float, str]:
    command = [
        sys.executable,
        __file__,
        "--only",
        name,
        "--coverage-seconds",
        str(seconds),
        "--as-child",
    ]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    runs = re.findall(r"^Done ([0-9]+) runs|^#([0-9]+)\s", done.stderr, re.MULTILINE)
    num_runs = max((int(a or b) for a, b in runs), default=0)
    return (
        num_runs,
        time.perf_counter() - started,
        float("nan"),
        done.stderr[-4000:] if done.returncode else "",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=110_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target")
    parser.add_argument(
        "--coverage-seconds", type=int, default=0, help="with atheris, for each target"
    )
    parser.add_argument("--as-child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_child:
        fuzz_by_coverage(arguments.only, arguments.coverage_seconds)
    import hostile_targets
    from hostile_targets import NEEDS, TARGETS

    signal.signal(
        signal.SIGALRM,
        lambda *_: (_ for _ in ()).throw(
            RuntimeError(f"it takes longer than {HANG_SECONDS} seconds")
        ),
    )
    here = {
        name: t for name, t in TARGETS.items() if importlib.util.find_spec(NEEDS.get(name, "rlad"))
    }
    total_weight = sum(target.weight for target in here.values())
    chosen = [arguments.only] if arguments.only else list(here)
    print(
        "| target | by | inputs | findings | seconds | slowest input |\n| --- | --- | --- | --- | "
        "--- | --- |"
    )
    totals = 0
    findings = []
    started = time.perf_counter()
    for name in chosen:
        results = [
            (
                "hypothesis",
                fuzz(
                    name, round(arguments.inputs * here[name].weight / total_weight), arguments.seed
                ),
            )
        ]
        if arguments.coverage_seconds and name not in IN_PROCESSES_OF_THEIR_OWN:
            results.append(("atheris", coverage_process(name, arguments.coverage_seconds)))
        for by, (num_inputs, seconds, slowest, finding) in results:
            totals += num_inputs
            findings += [finding] if finding else []
            shown = "" if slowest != slowest else f"{slowest * 1e3:.0f} ms"
            print(
                f"| {name} | {by} | {num_inputs:,} | {int(bool(finding))} | {seconds:.0f} | "
                f"{shown} |",
                flush=True,
            )
    print(f"| all | | {totals:,} | {len(findings)} | {time.perf_counter() - started:.0f} | |")
    with contextlib.suppress(OSError):
        hostile_targets.close()
    print("".join(f"\n{finding}" for finding in findings), end="")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
