"""The imitation map: what TRRD did with each token of some completions."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlad.comparison.comparable import Group
from rlad.comparison.runs import Run
from rlad.runs.directory import SAMPLES

OBJECTIVE = "trrd"
PHASES = ("early", "middle", "late")
MOST_TOKENS = 400
"""of a completion that is shown"""
MOST_METHODS = 3


@dataclass(frozen=True, slots=True)
class Fate:
    """What an update can do with a token: its letter in `samples.jsonl`, its CSS class and name,
    and what it means."""

    letter: str
    css: str
    name: str
    meaning: str


FATES = (
    Fate(
        "+",
        "reinforced",
        "reinforced",
        "better than its group, and the teacher does not object: made more likely",
    ),
    Fate(
        "h",
        "held",
        "held back",
        "better than its group, but the teacher finds it unlikely: no gradient",
    ),
    Fate(
        "-",
        "punished",
        "punished",
        "worse than its group, and the teacher does not defend it: made less likely",
    ),
    Fate(
        "p", "protected", "protected", "worse than its group, but the teacher likes it: no gradient"
    ),
    Fate(".", "untouched", "untouched", "no advantage, or no finite score"),
)
_BY_LETTER = {fate.letter: fate for fate in FATES}


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    fate: Fate
    is_clamped: bool
    note: str


@dataclass(frozen=True, slots=True)
class MappedCompletion:
    """A completion with the fate of each token; `tokens` are the first of `num_tokens`."""

    phase: str
    step: int
    verdict: str
    advantage: float
    prompt: str
    tokens: Sequence[Token]
    num_tokens: int
    counts: Sequence[tuple[Fate, int]]
    num_clamped: int


@dataclass(frozen=True, slots=True)
class Phase:
    """What happened to the tokens of a third of the run: shares by name of the fate, and of the
    clamped ones."""

    name: str
    first_step: int
    last_step: int
    num_tokens: int
    shares: dict[str, float]
    clamped: float


@dataclass(frozen=True, slots=True)
class ImitationMap:
    """The map of one run: shares of each fate early, in the middle and late, and completions chosen
    to show them."""

    method: str
    seed: int
    phases: Sequence[Phase]
    completions: Sequence[MappedCompletion]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A completion as it stands in `samples.jsonl`."""

    step: int
    prompt: str
    verdict: str
    tokens: Sequence[str]
    fates: str
    clamped: str
    log_ratios: Sequence[float | None]
    advantages: Sequence[float]

    @property
    def advantage(self) -> float:
        return self.advantages[0]

    @property
    def gated_share(self) -> float:
        """Share of tokens held back or protected; a completion of few tokens says little and counts
        as if it had ten."""
        return (self.fates.count("h") + self.fates.count("p")) / max(len(self.fates), 10)


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Imitation(_Model):
    fates: Annotated[str, Field(pattern=r"^[+h\-p.]*$")]
    advantages: list[float]
    clamped: Annotated[str, Field(pattern=r"^[c.]*$")] | None = None
    log_ratio_to_teacher: list[float | None] | None = None


class _Rollout(_Model):
    verdict: str
    tokens: list[str] | None = None
    imitation: _Imitation | None = None


class _Row(_Model):
    """What is read of a row of `samples.jsonl`."""

    step: Annotated[int, Field(ge=1)]
    prompt: str
    rollouts: list[_Rollout]


def imitation_maps(group: Group) -> list[ImitationMap]:
    """One for each TRRD method of a table (the first few), of its first seed that has recorded
    one."""
    found = (
        _first_map(m.name, m.runs)
        for m in group.methods
        if m.runs[0].config.objective.gates_by_teacher
    )
    return list(islice((each for each in found if each is not None), MOST_METHODS))


def _first_map(method: str, runs: Sequence[Run]) -> ImitationMap | None:
    return next((each for each in (_map_of(method, run) for run in runs) if each is not None), None)


def _map_of(method: str, run: Run) -> ImitationMap | None:
    """Of each third of the run: its shares, and of either sign of the advantage the completion with
    most gated tokens."""
    counts: dict[str, Counter[str]] = {}
    steps: dict[str, list[int]] = {}
    telling: dict[tuple[str, bool], _Recorded] = {}
    for recorded in _recorded(run):
        phase = PHASES[
            min(len(PHASES) - 1, (recorded.step - 1) * len(PHASES) // max(run.num_steps, 1))
        ]
        counts.setdefault(phase, Counter()).update(
            recorded.fates + recorded.clamped.replace(".", "")
        )
        steps.setdefault(phase, []).append(recorded.step)
        place = (phase, recorded.advantage > 0)
        if recorded.advantage and recorded.gated_share > (
            telling[place].gated_share if place in telling else -1
        ):
            telling[place] = recorded
    if not telling:
        return None
    phases = [_phase(name, steps[name], counts[name]) for name in PHASES if name in counts]
    chosen = [
        _mapped(phase, telling[phase, sign])
        for phase in PHASES
        for sign in (True, False)
        if (phase, sign) in telling
    ]
    return ImitationMap(method, run.seed, phases, chosen)


def _recorded(run: Run) -> Iterator[_Recorded]:
    """All recorded completions. A row that is damaged, or that another version has written
    otherwise, is passed over."""
    path = run.path / SAMPLES
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = _Row.model_validate_json(line)
            except ValidationError:
                continue
            for rollout in row.rollouts:
                tokens, record = rollout.tokens, rollout.imitation
                if not tokens or not record:
                    continue
                clamped = record.clamped or "." * len(tokens)
                log_ratios = record.log_ratio_to_teacher or [None] * len(tokens)
                if {len(record.fates), len(clamped), len(log_ratios), len(record.advantages)} == {
                    len(tokens)
                }:
                    given = (
                        row.prompt,
                        rollout.verdict,
                        tokens,
                        record.fates,
                        clamped,
                        log_ratios,
                        record.advantages,
                    )
                    yield _Recorded(row.step, *given)


def _phase(name: str, steps: Sequence[int], counts: Counter[str]) -> Phase:
    total = sum(counts[fate.letter] for fate in FATES)
    shares = {fate.name: counts[fate.letter] / total for fate in FATES}
    return Phase(name, min(steps), max(steps), total, shares, counts["c"] / total)


def _mapped(phase: str, recorded: _Recorded) -> MappedCompletion:
    columns = zip(
        recorded.tokens,
        recorded.fates,
        recorded.clamped,
        recorded.log_ratios,
        recorded.advantages,
        strict=True,
    )
    return MappedCompletion(
        phase=phase,
        step=recorded.step,
        verdict=recorded.verdict,
        advantage=recorded.advantage,
        prompt=recorded.prompt,
        tokens=[_token(*column) for column in islice(columns, MOST_TOKENS)],
        num_tokens=len(recorded.tokens),
        counts=[
            (fate, recorded.fates.count(fate.letter))
            for fate in FATES
            if fate.letter in recorded.fates
        ],
        num_clamped=recorded.clamped.count("c"),
    )


def _token(
    text: str, letter: str, clamped: str, log_ratio: float | None, advantage: float
) -> Token:
    fate, is_clamped = _BY_LETTER[letter], clamped == "c"
    said = (
        ""
        if log_ratio is None
        else f"; log student - log teacher {log_ratio:+.2f}{', clamped' if is_clamped else ''}"
    )
    return Token(text, fate, is_clamped, f"{fate.name}{said}; advantage {advantage:+.2f}")
