"""How far the native engine is from two other witnesses of the same mathematics; prints a table.

    python benchmarks/parity.py

The engine's loss and gradient are compared with a slow reference (one sequence after the other, all logits, formulas token by
token) and with `examples/02_tiny_loop.py`, on the batches of `tests/test_parity.py`: tiny random models, unequal lengths,
rollouts that are left out. The loss differs by |a - b| (its terms are of order 1), the gradient by |a - b| / |b|.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from parity_cases import OBJECTIVES, WordTask, by_engine, by_reference, by_tiny_loop, difference, make_case, rollouts_of

AGGREGATIONS = ("sequence_mean", "token_mean", "constant_length")
BATCHES = range(3)
Difference = tuple[float, float]


def against_reference(objective: str, family: str, dtype: torch.dtype) -> Iterator[Difference]:
    """All aggregations, with and without the KL leash, temperatures, and the second step on the same rollouts."""
    for aggregation in AGGREGATIONS:
        for kl_coef, temperature in ((0.0, 1.0), (0.3, 1.0), (0.0, 0.7)):
            optimization = {"aggregation": aggregation, "kl_coef": kl_coef, "steps_per_rollout_batch": 2, "learning_rate": 1e-3}
            case = make_case(
                objective, optimization=optimization, rollout={"temperature": temperature}, family=family, dtype=dtype
            )
            batch = case.engine.make_rollout_batch(0)
            for prompts in ([0, 1], [0, 1, 2, 3]):
                wanted = rollouts_of(case, prompts)
                yield difference(by_engine(case, batch, wanted), by_reference(case, batch, wanted))
                case.engine.update(batch, prompts)


def across_micro_batches(objective: str, family: str, dtype: torch.dtype) -> Iterator[Difference]:
    """One row at a time, and a few, against the whole batch at once."""
    for aggregation in AGGREGATIONS:
        results = []
        for tokens_per_batch in (10_000, 1, 30):
            optimization = {"aggregation": aggregation, "tokens_per_batch": tokens_per_batch}
            case = make_case(objective, optimization=optimization, family=family, dtype=dtype)
            results.append(by_engine(case, case.engine.make_rollout_batch(0), rollouts_of(case)))
        yield from (difference(other, results[0]) for other in results[1:])


def against_tiny_loop(alpha: float, family: str, dtype: torch.dtype) -> Iterator[Difference]:
    for index in BATCHES:
        case = make_case(knobs={"alpha": alpha}, family=family, dtype=dtype, task=WordTask(is_judged_in_full=True))
        batch, wanted = case.engine.make_rollout_batch(index), rollouts_of(case)
        yield difference(by_engine(case, batch, wanted), by_tiny_loop(case, batch, wanted, alpha=alpha))


def main() -> None:
    torch.set_num_threads(1)
    print("| comparison | objective | float64 loss | float64 gradient | float32 loss | float32 gradient |")
    print("| --- | --- | --- | --- | --- | --- |")
    # GPT-2 computes in float64 throughout; Llama is what most students are.
    precisions = (("gpt2", torch.float64), ("llama", torch.float32))
    for title, compare in (("slow reference", against_reference), ("micro-batches", across_micro_batches)):
        for objective in OBJECTIVES:
            row(title, objective, [list(compare(objective, *precision)) for precision in precisions])
    for name, alpha in (("trrd", 0.5), ("grpo (alpha = 1)", 1.0)):
        row("tiny loop", name, [list(against_tiny_loop(alpha, *precision)) for precision in precisions])


def row(title: str, objective: str, columns: list[list[Difference]]) -> None:
    figures = [f"{max(d[part] for d in differences):.1e}" for differences in columns for part in (0, 1)]
    print(f"| {title} | {objective} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
