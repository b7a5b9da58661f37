"""The same batches of TRRD by every engine: what `benchmarks/parity.py` compares.

A source takes a family of tiny models, a dtype and the indices of batches, and gives a loss and the
gradient of all weights, one vector, for each.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity_cases import (
    Case,
    EqualPrompts,
    Gradients,
    by_engine,
    by_tiny_loop,
    make_case,
    rollouts_of,
)
from rlad.engines.rollout_batch import RolloutBatch, padded

TESTS = Path(__file__).parents[1] / "tests"
TRL = {
    "TRL, 1 process": (1, ""),
    "TRL, DDP, 2 processes": (2, "ddp"),
    "TRL, `fully_shard`, 2 processes": (2, "fully_shard"),
}
Result = tuple[float, Tensor]
Source = Callable[[str, torch.dtype, Sequence[int]], list[Result]]
SECONDS = 900


def each_batch(
    family: str, dtype: torch.dtype, batches: Sequence[int]
) -> list[tuple[Case, RolloutBatch]]:
    cases = [
        make_case(family=family, dtype=dtype, task=EqualPrompts(is_judged_in_full=True))
        for _ in batches
    ]
    return [
        (case, case.engine.make_rollout_batch(index))
        for case, index in zip(cases, batches, strict=True)
    ]


def by_loop(family: str, dtype: torch.dtype, batches: Sequence[int]) -> list[Result]:
    made = each_batch(family, dtype, batches)
    return [
        flat(case, by_tiny_loop(case, batch, rollouts_of(case), alpha=0.5)) for case, batch in made
    ]


def by_native(family: str, dtype: torch.dtype, batches: Sequence[int]) -> list[Result]:
    made = each_batch(family, dtype, batches)
    return [flat(case, by_engine(case, batch, rollouts_of(case))) for case, batch in made]


def by_trl(world: int, wrapped: str) -> Source:
    """`RLADTrainer` in so many processes over gloo, its model wrapped so."""

    def source(family: str, dtype: torch.dtype, batches: Sequence[int]) -> list[Result]:
        from trl_parity import in_processes

        settings = {
            "family": family,
            "dtype": str(dtype).removeprefix("torch."),
            "is_judged_in_full": True,
        }
        cases = [settings | {"wrapped": wrapped, "batch_index": index} for index in batches]
        with tempfile.TemporaryDirectory() as folder:
            found = in_processes(world, Path(folder), *cases)
        return [(each["loss"], each["gradient"]) for each in found]

    return source


def by_verl(family: str, dtype: torch.dtype, batches: Sequence[int]) -> list[Result]:
    """Loss and gradient to the log-probs in a process of verl's environment, which may be another
    one."""
    made = each_batch(family, dtype, batches)
    scores = [case.engine.scorer(batch.prompts, batch.completions).logprobs for case, batch in made]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batches.pt"
        torch.save(
            [for_verl(batch, values) for (_, batch), values in zip(made, scores, strict=True)], file
        )
        command = [str(verl_python()), str(TESTS / "verl_batches.py"), str(file), "trrd"]
        subprocess.run(command, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
        found = torch.load(file)
    results = []
    for (case, _), values, verls in zip(made, scores, found, strict=True):
        values.backward(verls["gradient"])
        named = case.engine.student.model.named_parameters()
        results.append(
            flat(case, (verls["loss"], {name: p.grad for name, p in named if p.grad is not None}))
        )
    return results


def for_verl(batch: RolloutBatch, student: Tensor) -> dict[str, Any]:
    """See `Batch` of `tests/verl_batches.py`."""
    lengths = [len(completion) for completion in batch.completions]
    old = student.detach()
    nothing = torch.zeros_like(student)
    assert batch.teacher_logprobs is not None
    # Completions of advantage 0 have no score; what stands in its place has no influence.
    teacher = [
        values if len(values) else values.new_zeros(n, dtype=old.dtype)
        for values, n in zip(batch.teacher_logprobs, lengths, strict=True)
    ]
    return {
        "prompts": [len(prompt) for prompt in batch.prompts],
        "responses": lengths,
        "mask": torch.arange(student.shape[1])[None] < torch.tensor(lengths)[:, None],
        "student": old,
        "old": old,
        "teacher": padded(teacher, old),
        "advantages": batch.advantages[:, None].to(old).expand(old.shape),
        "reference": nothing,
        "weights": nothing,
    }


def verl_python() -> str | None:
    """The Python of an environment with verl and rlad; None where there is none."""
    here = sys.executable if importlib.util.find_spec("verl") else None
    return os.environ.get("RLAD_VERL_PYTHON", here)


def flat(case: Case, result: tuple[float, Gradients]) -> Result:
    loss, gradients = result
    names = [name for name, _ in case.engine.student.model.named_parameters()]
    return loss, torch.cat([gradients[name].flatten().double() for name in names])


def relative(ours: Result, theirs: Result) -> tuple[float, float]:
    """|a - b| / |b| of loss and gradient."""
    return abs(ours[0] - theirs[0]) / abs(theirs[0]), float(
        (ours[1] - theirs[1]).norm() / theirs[1].norm()
    )
