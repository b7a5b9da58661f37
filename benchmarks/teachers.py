"""The same teacher in every form: how far its log-probs are off, how fast it answers, what memory
it takes.

    python benchmarks/teachers.py --out runs/teachers
    python benchmarks/teachers.py --out runs/teachers --train \\
        --vllm-url http://127.0.0.1:8000/v1 --vllm-model teacher

The student samples completions of training problems once; each form of the teacher scores them in a
process of its own, and is compared with the local model in float32; tokens without a log-prob are
left out of the errors and counted. "memory" is how far the resident memory of the process that
trains rose at most, from the loaded student on (Linux: the peak is set back there through
/proc/self/clear_refs, so that loading the student does not count), until all was scored. What is
not installed or not given is left out and says so. `--train` adds the test pass@1 after a run of
the embedded default (or `--config`) with each form; runs that are there are not made again.
"""

import argparse
import ctypes
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

MIB = 1024**2
Section = dict[str, Any]
Row = dict[str, Any]


# --- one form, in a process of its own ------------------------------------------------------------


def measure(arguments: argparse.Namespace, teacher: Section) -> Row:
    """Scores the sampled completions with one form of the teacher."""
    from rlad.models.student import load_student
    from rlad.teachers import prepare_teacher
    from rlad.teachers.base import TeacherRequest

    config = config_of(arguments, teacher)
    student = load_student(config)
    sequences = json.loads((arguments.out / "sequences.json").read_text())
    requests = [TeacherRequest(prompt, completion) for prompt, completion in sequences]
    before = resident()
    made = prepare_teacher(config, student)
    assert made is not None
    with closing(made):
        if teacher["type"] != "cached":
            made.logprobs(requests[:2])  # the first call also loads kernels
        started = time.perf_counter()
        logprobs = made.logprobs(requests)
        seconds = time.perf_counter() - started
        counted = made.pop_metrics()
    num_tokens = sum(len(completion) for _, completion in sequences)
    return {
        "tokens_per_second": num_tokens / seconds,
        "memory_bytes": status_bytes("VmHWM") - before,
        "counted": counted,
        "logprobs": [values.tolist() for values in logprobs],
    }


def resident() -> int:
    """Bytes of main memory, after what was freed has been given back; the peak starts again from
    here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def sample_sequences(arguments: argparse.Namespace) -> None:
    """Writes prompts and completions of the student, the same for all forms."""
    from rlad.models.student import load_student
    from rlad.rollouts.prompts import prompt_token_ids
    from rlad.rollouts.sampling import sample
    from rlad.tasks import make_task

    config = config_of(arguments, None)
    student = load_student(config)
    with closing(make_task(**config.task.model_dump())) as task:
        texts = [task.problem("train", i).prompt for i in range(arguments.num_prompts)]
    prompts = [prompt_token_ids(student.tokenizer, text, config.rollout) for text in texts]
    groups = sample(
        student,
        prompts,
        group_size=config.rollout.group_size,
        max_completion_tokens=arguments.max_tokens,
        temperature=config.rollout.temperature,
        seed=0,
    )
    pairs = [
        (prompt, completion.token_ids)
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]
    (arguments.out / "sequences.json").write_text(json.dumps(pairs))


def config_of(arguments: argparse.Namespace, teacher: Section | None) -> Any:
    """The run with this `[teacher]` section; None leaves its own."""
    from rlad.config.file import load_config, parse_config

    table = load_config(arguments.config).model_dump(mode="json", exclude_none=True)
    return parse_config(table if teacher is None else table | {"teacher": teacher})


# --- all forms ------------------------------------------------------------------------------------


def forms(
    arguments: argparse.Namespace, served: Section | None
) -> Iterator[tuple[str, Section | None, str]]:
    """(name, section, why it is left out)."""
    local = {"type": "local", "model": arguments.model}
    yield "local float32", local, ""
    yield "local bfloat16", {**local, "dtype": "bfloat16"}, ""
    yield "local int8", {**local, "quantization": "int8"}, ""
    yield "local int4", {**local, "dtype": "bfloat16", "quantization": "int4"}, ""
    yield (
        "served by rlad, float32",
        served,
        "" if served else "the server did not start (rlad[serve] is needed)",
    )
    vllm = {
        "type": "served",
        "urls": [arguments.vllm_url],
        "model": arguments.vllm_model,
        "tolerance": arguments.tolerance,
    }
    yield "served by vLLM", vllm if arguments.vllm_url else None, "give --vllm-url and --vllm-model"
    cached = {"type": "cached", "directory": str(arguments.out / "cache"), "teacher": local}
    yield "cached, cold", cached, ""
    yield "cached, warm", cached, ""


@contextmanager
def own_server(arguments: argparse.Namespace) -> Iterator[Section | None]:
    """The section of a teacher served by `rlad serve-teacher`, while the server runs; None when it
    does not start."""
    command = [
        sys.executable,
        "-m",
        "rlad",
        "serve-teacher",
        arguments.model,
        "--engine",
        "rlad",
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = None
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if url := re.search(r"http://[\w.:]+/v1", line):
            break
    try:
        if url is None:
            print(
                f"rlad serve-teacher: {(seen.strip().splitlines() or ['no answer'])[-1]}",
                file=sys.stderr,
            )
            yield None
        else:
            yield {
                "type": "served",
                "urls": [url[0]],
                "model": arguments.model,
                "tolerance": arguments.tolerance,
            }
    finally:
        process.terminate()
        process.wait()


def in_own_process(arguments: argparse.Namespace, teacher: Section) -> Row | str:
    """What `measure` returns there, or the last line of what went wrong."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps(teacher)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def errors(row: Row, reference: Row) -> tuple[float, float, int]:
    """Mean and largest difference of log-probs, nats (NaN when there is none), and the number of
    tokens that lack one."""
    ours, theirs = (chain.from_iterable(one["logprobs"]) for one in (row, reference))
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    sizes = [size for size in differences if not math.isnan(size)] or [math.nan]
    return fmean(sizes), max(sizes), sum(map(math.isnan, differences))


def final_pass_at_1(arguments: argparse.Namespace, name: str, teacher: Section) -> float:
    """After a run with this teacher."""
    import rlad
    from rlad.runs.directory import EVAL, RunDirectory

    run = RunDirectory(arguments.out / "runs" / re.sub(r"\W+", "-", name))
    if not run.is_finished():
        config = config_of(arguments, teacher)
        loop = config.optimization.model_copy(
            update={"num_steps": arguments.train_steps or config.optimization.num_steps}
        )
        rlad.train(
            config.model_copy(update={"run_dir": str(run.path), "optimization": loop}),
            overwrite=run.exists(),
        )
    return [row["pass@1"]["mean"] for row in run.read(EVAL) if row["split"] == "test"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the figures, the cache and the runs"
    )
    parser.add_argument("--config", help="TOML of a run; by default the embedded one")
    parser.add_argument("--model", default="embedded/teacher", help="the teacher's weights")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="forms whose name holds one of these, and local float32",
    )
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=320, help="of a completion")
    parser.add_argument("--tolerance", type=float, default=0.3, help="of served teachers, nats")
    parser.add_argument("--vllm-url", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--vllm-model", default="", help="the name under which it serves the same weights"
    )
    parser.add_argument("--train", action="store_true", help="also train with each form")
    parser.add_argument("--train-steps", type=int, help="instead of the config's")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments, json.loads(arguments.case))))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(arguments.out / "cache", ignore_errors=True)
    sample_sequences(arguments)
    with own_server(arguments) as served:
        compare(arguments, served)


def compare(arguments: argparse.Namespace, served: Section | None) -> None:
    """Prints the table, a line as soon as it is known, and writes the figures."""
    columns = (
        "| teacher | mean error | largest error | missing tokens | tokens/s | memory MiB "
        "| test pass@1 |"
    )
    print(columns + "\n|" + " --- |" * 7, flush=True)
    rows: list[Row] = []
    reference: Row | None = None
    for name, teacher, why in forms(arguments, served):
        if reference and not any(part in name for part in arguments.only):
            continue
        row = in_own_process(arguments, teacher) if teacher else why
        if isinstance(row, str) or teacher is None:
            print(f"| {name} | left out: {row} | | | | | |", flush=True)
            rows.append({"teacher": name, "left_out": row})
            continue
        reference = reference or row
        mean, most, missing = errors(row, reference)
        trained = final_pass_at_1(arguments, name, teacher) if arguments.train else None
        after = "" if trained is None else f"{trained:.1%}"
        speed = row["tokens_per_second"]
        memory = row["memory_bytes"] / MIB
        print(
            f"| {name} | {mean:.1e} | {most:.1e} | {missing} | {speed:.0f} | {memory:.0f} | "
            f"{after} |",
            flush=True,
        )
        figures = {key: value for key, value in row.items() if key != "logprobs"}
        compared = {
            "mean_error": mean,
            "largest_error": most,
            "missing_tokens": missing,
            "test_pass_at_1": trained,
        }
        rows.append({"teacher": name} | compared | figures)
    (arguments.out / "teachers.json").write_text(
        json.dumps(rows, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
