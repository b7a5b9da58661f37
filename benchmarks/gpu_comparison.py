"""GRPO, TRRD and OPD with a larger student and teacher of the embedded recipe's kind, made on the
device, with as many seeds as fit into a time:

    python benchmarks/gpu_comparison.py --out runs/gpu_comparison --minutes 12
    python benchmarks/gpu_comparison.py --out runs/tiny --minutes 3 --smoke       on the CPU

The student has about 6 million parameters, the teacher about 39; `--student` and `--teacher` take
other sizes, as HIDDEN,LAYERS,HEADS. Each seed is one more `rlad compare` of the same folder, which
prints its table; no seed is begun that would end too late if it took as long as the longest.
"""

import argparse
import importlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

ROOT = Path(__file__).parents[1]
METHODS = ("grpo", "trrd", "opd")
BASE_HIDDEN = 96
"""of the embedded models, whose learning rate of pretraining falls as the width grows"""
Size = tuple[int, int, int]


def recipe() -> Any:
    sys.path.append(str(ROOT / "recipes" / "embedded_models"))
    return importlib.import_module("make")


def make_model(make: Any, name: str, shape: Size, folder: Path, effort: float) -> None:
    """Pretrain a model as the recipe does, with `effort` times its steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = make.make_tokenizer()
    model = make.build(tokenizer, *shape).to(device)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    for phase in (make.BASE, make.SECOND[name]):
        steps = max(1, round(effort * phase.num_steps))
        rate = phase.learning_rate * BASE_HIDDEN / shape[0]
        make.pretrain(model, replace(phase, num_steps=steps, learning_rate=rate), tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_comparison(out: Path, options: Any) -> Path:
    problems = ("num_validation_problems", "num_test_problems", "num_ood_problems")
    shared = {
        "student": {"model": str(out / "student")},
        "teacher": {"model": str(out / "teacher")},
        "optimization": {"num_steps": options.steps, "learning_rate": options.learning_rate},
        "evaluation": dict.fromkeys(problems, options.problems),
    }
    table = {
        "run": str(ROOT / "benchmarks" / "comparisons" / "run.toml"),
        "directory": str(out / "comparison"),
        "jobs": options.jobs,
        "methods": {name: {} for name in METHODS},
        "shared": shared,
    }
    path = out / "compare.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


def rlad(*arguments: str) -> int:
    print("$ rlad", *arguments, flush=True)
    return subprocess.run([sys.executable, "-m", "rlad", *arguments]).returncode


def size(text: str) -> Size:
    hidden, layers, heads = map(int, text.split(","))
    return hidden, layers, heads


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="in all, models included")
    parser.add_argument("--student", type=size, default=(256, 8, 4), metavar="H,L,N")
    parser.add_argument("--teacher", type=size, default=(640, 8, 10), metavar="H,L,N")
    parser.add_argument("--effort", type=float, default=1.0, help="steps of pretraining, x recipe")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of all methods")
    parser.add_argument("--problems", type=int, default=200, help="of each test")
    parser.add_argument("--jobs", type=int, default=len(METHODS), help="runs side by side")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, untrained models")
    options = parser.parse_args()
    if options.smoke:
        sizes = {"student": (32, 2, 2), "teacher": (48, 2, 2), "effort": 0.02, "steps": 2}
        vars(options).update(sizes, problems=8, jobs=1)
    started = time.monotonic()
    out = options.out.absolute()
    make = recipe()
    for name in ("teacher", "student"):
        if not (out / name / "config.json").is_file():
            make_model(make, name, getattr(options, name), out / name, options.effort)
    task = ["task.num_people=[2,3,3]", "task.instructions=false", "task.vary_names=false"]
    limits = ["rollout.max_completion_tokens=320", "--num-problems", str(options.problems)]
    teacher = str(out / "teacher")
    rlad("evaluate", teacher, "--task", "knights_and_knaves", *task, *limits, "--num-samples", "4")
    comparison = str(write_comparison(out, options))
    longest = 0.0
    seeds: list[int] = []
    while time.monotonic() - started + longest < 60 * options.minutes:
        begun = time.monotonic()
        seeds.append(len(seeds))
        if code := rlad("compare", comparison, f"seeds={seeds}"):
            sys.exit(code)
        longest = max(longest, time.monotonic() - begun)
    print(f"\n{len(seeds)} seeds in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
