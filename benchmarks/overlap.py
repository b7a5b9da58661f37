"""What it is worth to ask a served teacher while the student still writes: the same rollout batches
with and without.

    python benchmarks/overlap.py        the default case, under two minutes on two idle cores
    python benchmarks/overlap.py --teacher-hidden 192 --lengths equal   no tail to hide anything in

The student decodes on one thread in this process, `rlad serve-teacher` scores on one thread in
another; both are random models. Completions are replayed (`replay.py`). Each round makes one
rollout batch (sampling, rewards, teacher's log-probs; no update) both ways, the one that begins
changing from round to round; the first round is a warm-up and not counted. "waited" is what the
student waited for the teacher, "hidden" what the teacher worked before that. The log-probs of both
ways are compared: the server scores together what arrives together, so they differ by rounding.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from replay import Case, Script, language_model
from step_engines import make_engine
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from rlad.engines.native.loop import NativeEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from running_servers import free_port, server_process

WAYS = ("afterwards", "ahead")
COLUMNS = ("total", "generation", "waited", "hidden", "processor")
Row = dict[str, float]


@contextmanager
def served_teacher(case: Case, folder: Path) -> Iterator[Any]:
    """The teacher of a case behind `rlad serve-teacher` with one thread, as a teacher of this
    process."""
    from rlad.config.run import RunConfig
    from rlad.teachers import make_teacher
    from rlad.teachers.base import Setting

    # One token longer than the longest text: a server has to write one for each that it scores.
    model = language_model(replace(case, max_tokens=case.max_tokens + 1), seed=1, is_teacher=True)
    model.model.save_pretrained(folder / "teacher")
    model.tokenizer.save_pretrained(folder / "teacher")
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "rlad",
        "serve-teacher",
        str(folder / "teacher"),
        "--engine",
        "rlad",
        "--port",
        str(port),
    ]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with server_process(
        command, port, folder / "log", seconds=120, environment=os.environ | threads
    ):
        served = {
            "type": "served",
            "urls": [f"http://127.0.0.1:{port}/v1"],
            "model": str(folder / "teacher"),
        }
        config = RunConfig.model_validate(
            {
                "student": {"model": "random"},
                "teacher": {**served, "tolerance": 1e-3},
                "task": {"type": "knights_and_knaves"},
                "rollout": {
                    "max_prompt_tokens": case.prompt_tokens,
                    "max_completion_tokens": case.max_tokens,
                },
            }
        )
        student = language_model(case, seed=0)
        with closing(
            make_teacher(config.teacher, Setting(config, student.tokenizer, None))
        ) as teacher:
            yield teacher


def measure(case: Case, teacher: Any, num_rounds: int) -> dict[str, list[Row]]:
    """The seconds of each way, round by round, without the warm-up."""
    engine = make_engine(case, num_steps=num_rounds + 1)
    script = Script(case)
    engine.teacher = teacher
    script.replay_in_our_sampler()
    rounds: dict[str, list[Row]] = {way: [] for way in WAYS}
    for number in range(num_rounds + 1):
        logprobs: dict[str, Tensor] = {}
        for way in WAYS if number % 2 else reversed(WAYS):
            type(teacher).works_elsewhere = property(lambda _, way=way: way == "ahead")
            script.start(number)
            row, batch = one_batch(engine, number)
            rounds[way].append(row)
            script.require_replayed([list(completion) for completion in batch.completions])
            logprobs[way] = torch.cat(batch.teacher_logprobs)
        torch.testing.assert_close(logprobs["ahead"], logprobs["afterwards"], rtol=0, atol=1e-4)
    return {way: rows[1:] for way, rows in rounds.items()}


def one_batch(engine: NativeEngine, number: int) -> tuple[Row, Any]:
    started = time.perf_counter()
    used = time.process_time()
    batch = engine.make_rollout_batch(number)
    row = {"total": time.perf_counter() - started, "processor": time.process_time() - used}
    waited, hidden = (
        batch.seconds.get(key, 0.0) for key in ("time/teacher/seconds", "teacher/overlap/seconds")
    )
    return row | {
        "generation": batch.seconds["time/generation/seconds"],
        "waited": waited,
        "hidden": hidden,
    }, batch


def table(rounds: dict[str, list[Row]]) -> str:
    lines = [f"| asked | {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
    for way, rows in rounds.items():
        lines.append(
            f"| {way} | "
            f"{' | '.join(f'{median(row[name] for row in rows):.2f}' for name in COLUMNS)} |"
        )
    for name in ("total", "processor"):
        ratios = [
            ahead[name] / after[name]
            for after, ahead in zip(*(rounds[way] for way in WAYS), strict=True)
        ]
        lines.append(
            f"\n{name} ahead / afterwards: {median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = replace(
        Case(),
        max_tokens=512,
        num_prompts=16,
        group_size=4,
        zero_variance=0.3,
        teacher_hidden=384,
        threads=1,
    )
    for name in (
        "vocabulary",
        "max_tokens",
        "num_prompts",
        "group_size",
        "hidden",
        "layers",
        "teacher_hidden",
        "teacher_layers",
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument("--zero-variance", type=float, default=default.zero_variance)
    parser.add_argument("--lengths", choices=["long_tail", "equal"], default=default.lengths)
    parser.add_argument("--rounds", type=int, default=5)
    options = vars(parser.parse_args())
    num_rounds = options.pop("rounds")
    case = replace(default, **options)
    torch.set_num_threads(1)
    disable_progress_bar()
    print(f"load {os.getloadavg()[0]:.2f}, cores {os.cpu_count()}; {case.title}", flush=True)
    with tempfile.TemporaryDirectory() as folder, served_teacher(case, Path(folder)) as teacher:
        rounds = measure(case, teacher, num_rounds)
    print(
        f"Seconds of a rollout batch, medians of {num_rounds} rounds; processor: of the student's "
        f"process.\n\n{table(rounds)}"
    )
    server = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"processor of the server: {server.ru_utime + server.ru_stime:.1f} s in all; load "
        f"{os.getloadavg()[0]:.2f}"
    )


if __name__ == "__main__":
    main()
