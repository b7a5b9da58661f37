"""Memory and time of each support of a divergence: forward and backward of the output layer.

    python benchmarks/supports.py            vocabulary 150,000, 2,048 tokens, a fresh process each

Bytes are the peak of resident memory beyond what was held before: hidden states, both output
matrices and the gradient of the student's. Seconds are of CPU time, on one thread. `sampled` is the
student's log-prob of one token with its gradient, and the teacher's; the others are that and the
Jensen-Shannon divergence, `columns` with what a server or a cache has sent. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from memory import resident, status_bytes
from step_engines import environment

from rlad.objectives.divergences import divergence_of
from rlad.scoring.columns import columns_of
from rlad.scoring.distributions import Distributions
from rlad.scoring.token_divergence import token_divergence
from rlad.scoring.token_logprobs import token_logprobs
from rlad.scoring.top_k import column_divergence, top_k_divergence

SUPPORTS = ("sampled", "student_top_k", "teacher_top_k", "columns", "full")


def measure_here(support: str, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = (options.tokens, options.vocabulary, options.hidden)
    student, teacher = (_random_distributions(*sizes) for _ in range(2))
    weight_grad = torch.zeros_like(student.weight)
    student = student._replace(
        hidden=student.hidden.requires_grad_(),
        weight=student.weight.requires_grad_(),
        weight_grad=weight_grad,
    )
    targets = torch.randint(options.vocabulary, (options.tokens,))
    measure = divergence_of("jsd")
    # What a server or a cache has sent: no output matrix of the teacher is read.
    columns = columns_of(teacher, options.top_k) if support == "columns" else None
    held = resident()
    seconds = []
    for _ in range(options.repeats):
        student.hidden.grad = None
        started = time.process_time()
        loss = token_logprobs(student, targets)[0].sum()
        if support == "sampled":
            with torch.no_grad():
                token_logprobs(teacher, targets, with_entropy=False)
        elif support == "full":
            loss = loss + token_divergence(student, teacher, measure).sum()
        elif columns is not None:
            values = column_divergence(student, columns.ids, columns.logprobs, measure)
            loss = loss + values.sum()
        else:
            chosen = student if support == "student_top_k" else teacher
            values = top_k_divergence(
                student, teacher, measure, top_k=options.top_k, chosen_by=chosen
            )
            loss = loss + values.sum()
        loss.backward()
        seconds.append(time.process_time() - started)
    return {"bytes": status_bytes("VmHWM") - held, "seconds": statistics.median(seconds)}


def _random_distributions(num_tokens: int, vocabulary: int, hidden: int) -> Distributions:
    states = torch.randn(num_tokens, hidden)
    return Distributions(states, torch.randn(vocabulary, hidden) / hidden**0.5)


def measure(support: str, arguments: list[str]) -> dict[str, float]:
    """`measure_here` in a fresh process, whose allocator gives freed memory back at once."""
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    variables = {**os.environ, **dict(environment()), **thresholds}
    command = [sys.executable, __file__, *arguments, "--child", support]
    done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=SUPPORTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_here(options.child, options)))
        return
    whole = 4 * options.tokens * options.vocabulary
    print(f"one tensor of tokens x vocabulary: {whole / 2**20:.0f} MiB\n")
    print("| support | peak, MiB | CPU seconds | relative to sampled |\n|---|---:|---:|---:|")
    baseline = 0.0
    for support in SUPPORTS:
        found = measure(support, sys.argv[1:])
        baseline = baseline or found["seconds"]
        print(
            f"| `{support}` | {found['bytes'] / 2**20:.0f} | {found['seconds']:.2f} | "
            f"{found['seconds'] / baseline:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
