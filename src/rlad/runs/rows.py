"""The rows of a run's files, as doctor, report and compare read them, and summaries of held-out
results.

A row that a run would not write becomes a sentence; the reader decides what to do with it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from rlad.config.types import Count, NonNegativeInt
from rlad.errors import UserError
from rlad.runs.directory import EVAL, METRICS, RunDirectory
from rlad.runs.statistics import Estimate, mean_over_seeds, pass_at_k


class Row(BaseModel):
    """A row of any file of a run."""

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0, lt=2**53)


class StepRow(Row):
    """A row of metrics.jsonl. A figure may be infinite, such as the largest ratio."""

    # Metrics are not declared as fields, since the metrics of a row depend on the method.
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """The verdicts on the samples of one held-out problem."""

    index: int
    key: str
    """problems with the same key are variants of one another"""
    difficulty: str
    num_samples: Count
    num_correct: NonNegativeInt
    num_cannot_judge: NonNegativeInt
    num_truncated: NonNegativeInt
    mean_completion_tokens: Annotated[float, Field(ge=0, lt=1e18)]
    prompt: str
    first_completion: str
    mean_turns: Annotated[float, Field(ge=0, lt=1e9)] | None = None
    """mean number of turns, for episodes"""

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        if self.mean_turns is None:
            del row["mean_turns"]
        return row


class EvaluationRow(Row):
    """A row of eval.jsonl."""

    model_config = ConfigDict(strict=False)

    split: str
    pass_at_1: Estimate = Field(alias="pass@1")
    results: list[ProblemResult] = Field(min_length=1)

    @model_validator(mode="after")
    def _counts_are_possible(self) -> "EvaluationRow":
        # Inconsistent counts would give shares above 1.
        num_samples = self.results[0].num_samples
        for r in self.results:
            most = max(r.num_correct, r.num_cannot_judge, r.num_truncated)
            if not most <= r.num_samples == num_samples:
                raise ValueError(
                    f"problem {r.index} has counts that {num_samples} samples cannot have"
                )
        return self


class Imitation(BaseModel):
    """The fates of a completion's tokens in an update; see `rlad.engines.imitation`."""

    fates: Annotated[str, Field(pattern=r"^[+h\-p.e]*$")]
    advantages: list[FiniteFloat]
    clamped: Annotated[str, Field(pattern=r"^[c.]*$")] | None = None
    log_ratio_to_teacher: list[FiniteFloat | None] | None = None


class SampledRollout(BaseModel):
    """A completion in samples.jsonl, possibly with an imitation that has an entry per token."""

    verdict: str
    text: str | None = None
    tokens: list[str] | None = None
    imitation: Imitation | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "SampledRollout":
        if self.imitation is not None:
            # Whatever was recorded has one entry for each token.
            columns = [value for _, value in self.imitation if value is not None]
            if {len(column) for column in columns} != {len(self.tokens or ())}:
                raise ValueError("the imitation has not one entry for each token")
        return self


class SampleRow(Row):
    """A row of samples.jsonl."""

    step: int = Field(ge=1)
    prompt: str
    pictures: list[Annotated[str, Field(pattern="^data:image/png;base64,[A-Za-z0-9+/=]+$")]] = []
    rollouts: list[SampledRollout]


AnyRow = TypeVar("AnyRow", bound=Row)


def read_rows(run: RunDirectory, name: str, kind: type[AnyRow]) -> Iterator[AnyRow | str]:
    """Yield the rows of a file, and for a damaged row a sentence without its full stop. Yields
    nothing if there is no such file."""
    for number, row in enumerate(run.lines(name), start=1):
        if not isinstance(row, dict):
            yield f"row {number} of {name} is not a JSON object"
            continue
        # pydantic names the field and its fault; the first fault of a row is enough.
        try:
            yield kind.model_validate(row)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = f", {'.'.join(map(str, first['loc']))}" if first["loc"] else ""
            yield f"row {number} of {name}{where}: {first['msg']}"


@dataclass(frozen=True, slots=True)
class History:
    """The steps and evaluations of a run."""

    steps: Sequence[Mapping[str, float]]
    evaluations: Sequence[EvaluationRow]
    damage: Sequence[str]
    """the first damaged row of each file; all other rows are read"""

    @property
    def validations(self) -> list[EvaluationRow]:
        rows = [row for row in self.evaluations if row.split == "validation"]
        return sorted(rows, key=lambda row: row.step)


def read_history(run: RunDirectory) -> History:
    """Read metrics.jsonl and eval.jsonl."""
    steps = list(read_rows(run, METRICS, StepRow))
    evaluations = list(read_rows(run, EVAL, EvaluationRow))
    return History(
        [row.model_dump() for row in steps if not isinstance(row, str)],
        [row for row in evaluations if not isinstance(row, str)],
        first_damage(steps) + first_damage(evaluations),
    )


def first_damage(rows: Iterable[Row | str]) -> list[str]:
    return [row for row in rows if isinstance(row, str)][:1]


# --- held-out results -----------------------------------------------------------------------------


def pass_at_1(results: Sequence[ProblemResult]) -> Estimate:
    """Estimate pass@1 (= mean@k), the share of correct samples, averaged over problems."""
    values = [r.num_correct / r.num_samples for r in results]
    return mean_over_seeds([values], [r.key for r in results])


def ks_up_to(num_samples: int) -> list[int]:
    """List the k of pass@k that are reported: 1, 2, 4, ... and the number of samples itself."""
    return sorted(
        {num_samples, *(2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples)}
    )


def summarise(results_by_seed: Sequence[Sequence[ProblemResult]]) -> dict[str, Any]:
    """Estimate mean@k, pass@k for k = 1, 2, 4, ... up to the number of samples, and pass@1 by
    difficulty; each with its interval over the problems and, with several, the seeds.

    All seeds have the same problems. A completion that could not be judged counts as not correct.
    """
    flat = [result for results in results_by_seed for result in results]
    if not flat:
        raise UserError("there are no results to summarise; evaluate at least one problem.")
    n = flat[0].num_samples

    def estimate(k: int, difficulty: str | None = None) -> Estimate:
        chosen = [
            [r for r in results if difficulty in (None, r.difficulty)]
            for results in results_by_seed
        ]
        values = [[pass_at_k(n, r.num_correct, k) for r in results] for results in chosen]
        return mean_over_seeds(values, [r.key for r in chosen[0]], limits=(0, 1))

    num_turns = [r.mean_turns for r in flat if r.mean_turns is not None]
    difficulties = sorted({r.difficulty for r in flat} - {""})
    return {
        "num_problems": len(results_by_seed[0]),
        "num_samples": n,
        f"mean@{n}": estimate(1),
        "pass@k": {k: estimate(k) for k in ks_up_to(n)},
        "pass@1 by difficulty": {name: estimate(1, name) for name in difficulties},
        "mean_completion_tokens": sum(r.mean_completion_tokens for r in flat) / len(flat),
        **({"mean_turns": sum(num_turns) / len(num_turns)} if num_turns else {}),
        "truncated_share": sum(r.num_truncated for r in flat) / (n * len(flat)),
        "cannot_judge_share": sum(r.num_cannot_judge for r in flat) / (n * len(flat)),
    }
