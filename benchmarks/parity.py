"""How far the witnesses of one mathematics are apart; prints two Markdown tables.

    python benchmarks/parity.py                     # all that is installed here
    python benchmarks/parity.py engines --json      # one table, as JSON
    RLAD_VERL_PYTHON=$(.ci/verl-environment DIRECTORY) python benchmarks/parity.py engines

`witnesses`: the native engine's loss and gradient against a slow reference (one sequence after the
other, all logits, formulas token by token), against itself with other micro-batches, and against
`examples/02_tiny_loop.py`, on the batches of `tests/engines/test_parity.py`: tiny random models,
unequal lengths, rollouts that are left out. The loss differs by |a - b| (its terms are of order 1),
the gradient by |a - b| / |b|.

`engines`: TRRD's loss and gradient on the same three batches by every engine against the tiny loop,
both relative. verl gives the loss and its gradient to the log-probs; the rest of the way to the
weights is the native engine's.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import parity_engines
import torch

from parity_cases import (
    OBJECTIVES,
    WordTask,
    by_engine,
    by_reference,
    by_tiny_loop,
    difference,
    make_case,
    rollouts_of,
)

AGGREGATIONS = ("sequence_mean", "token_mean", "constant_length")
BATCHES = range(3)
# GPT-2 computes in float64 throughout; Llama is what most students are.
PRECISIONS = (("gpt2", torch.float64), ("llama", torch.float32))
FIGURES = ("float64 loss", "float64 gradient", "float32 loss", "float32 gradient")
Difference = tuple[float, float]
Row = dict[str, str | float]


def against_reference(objective: str, family: str, dtype: torch.dtype) -> Iterator[Difference]:
    """All aggregations, with and without the KL leash, temperatures, and the second step on the
    same rollouts."""
    for aggregation in AGGREGATIONS:
        for kl_coef, temperature in ((0.0, 1.0), (0.3, 1.0), (0.0, 0.7)):
            optimization = {
                "aggregation": aggregation,
                "kl_coef": kl_coef,
                "steps_per_rollout_batch": 2,
                "learning_rate": 1e-3,
            }
            case = make_case(
                objective,
                optimization=optimization,
                rollout={"temperature": temperature},
                family=family,
                dtype=dtype,
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
        case = make_case(
            knobs={"alpha": alpha},
            family=family,
            dtype=dtype,
            task=WordTask(is_judged_in_full=True),
        )
        batch = case.engine.make_rollout_batch(index)
        wanted = rollouts_of(case)
        yield difference(
            by_engine(case, batch, wanted), by_tiny_loop(case, batch, wanted, alpha=alpha)
        )


def witnesses() -> Iterator[Row]:
    for title, compare in (
        ("slow reference", against_reference),
        ("micro-batches", across_micro_batches),
    ):
        for objective in OBJECTIVES:
            columns = [list(compare(objective, *precision)) for precision in PRECISIONS]
            yield {"comparison": title, "objective": objective} | largest(columns)
    for name, alpha in (("trrd", 0.5), ("grpo (alpha = 1)", 1.0)):
        columns = [list(against_tiny_loop(alpha, *precision)) for precision in PRECISIONS]
        yield {"comparison": "tiny loop", "objective": name} | largest(columns)


def engines() -> Iterator[Row]:
    sources = {"native": parity_engines.by_native}
    if importlib.util.find_spec("trl"):
        sources |= {title: parity_engines.by_trl(*how) for title, how in parity_engines.TRL.items()}
    if parity_engines.verl_python():
        sources["verl's loss"] = parity_engines.by_verl
    for title, source in sources.items():
        columns = []
        for family, dtype in PRECISIONS:
            wanted = parity_engines.by_loop(family, dtype, BATCHES)
            pairs = zip(source(family, dtype, BATCHES), wanted, strict=True)
            columns.append([parity_engines.relative(ours, theirs) for ours, theirs in pairs])
        yield {"engine": title} | largest(columns)


def largest(columns: list[list[Difference]]) -> Row:
    """Of the differences of loss and gradient in each precision."""
    figures = [max(d[part] for d in differences) for differences in columns for part in (0, 1)]
    return dict(zip(FIGURES, figures, strict=True))


TABLES = {"witnesses": witnesses, "engines": engines}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"{' or '.join(TABLES)}; all unless said"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"there is no table {', '.join(unknown)}; choose from {', '.join(TABLES)}.")
    torch.set_num_threads(1)
    tables = {name: TABLES[name]() for name in options.tables or TABLES}
    if options.json:
        print(json.dumps({name: list(rows) for name, rows in tables.items()}, indent=2))
    else:
        for rows in tables.values():
            print_table(rows)


def print_table(rows: Iterator[Row]) -> None:
    for i, row in enumerate(rows):
        if i == 0:
            print(f"\n| {' | '.join(row)} |\n|{' --- |' * len(row)}")
        print(
            f"| {' | '.join(f'{x:.1e}' if isinstance(x, float) else x for x in row.values())} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
