"""The imitation map: what TRRD did with each token of some completions."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlad.comparison.figures import Method
from rlad.comparison.finished_runs import Run
from rlad.runs.directory import SAMPLES, RunDirectory
from rlad.runs.rows import Imitation, SampledRollout, SampleRow, read_rows

PHASES = ("early", "middle", "late")
MOST_TOKENS = 400
"""Most tokens of a completion to show."""
MOST_METHODS = 3


@dataclass(frozen=True, slots=True)
class Fate:
    """The fate of a token in an update: its letter in `samples.jsonl`, its name and its meaning."""

    letter: str
    name: str
    meaning: str

    @property
    def css(self) -> str:
        """The CSS class of the fate."""
        return self.name.partition(" ")[0]


FATES = (
    Fate("+", "reinforced", "better than its group, no objection of the teacher: more likely now"),
    Fate("h", "held back", "better than its group, but unlikely by the teacher: no gradient"),
    Fate("-", "punished", "worse than its group, no defence by the teacher: less likely now"),
    Fate("p", "protected", "worse than its group, but the teacher likes it: no gradient"),
    Fate(".", "untouched", "no advantage, or no finite score"),
)
ENVIRONMENT = Fate("e", "environment", "written by the environment: read, not trained on")
_BY_LETTER = {fate.letter: fate for fate in (*FATES, ENVIRONMENT)}


@dataclass(frozen=True, slots=True)
class Token:
    """A token to show."""

    text: str
    fate: Fate
    is_clamped: bool
    note: str


@dataclass(frozen=True, slots=True)
class MappedCompletion:
    """A completion with the fate of each token."""

    phase: str
    row: SampleRow
    rollout: SampledRollout
    imitation: Imitation

    @property
    def advantage(self) -> float:
        return self.imitation.advantages[0]

    @property
    def gated_share(self) -> float:
        """Share of tokens held back or protected. A completion with fewer than ten tokens counts as
        if it had ten, since few tokens say little."""
        fates = self.imitation.fates
        num_written = len(fates) - fates.count(ENVIRONMENT.letter)
        return (fates.count("h") + fates.count("p")) / max(num_written, 10)

    @property
    def counts(self) -> list[tuple[Fate, int]]:
        fates = self.imitation.fates
        return [(fate, fates.count(fate.letter)) for fate in FATES if fate.letter in fates]

    @property
    def num_clamped(self) -> int:
        return (self.imitation.clamped or "").count("c")

    @property
    def tokens(self) -> list[Token]:
        """The tokens to show, at most the first `MOST_TOKENS`."""
        tokens = []
        for i, text in enumerate((self.rollout.tokens or ())[:MOST_TOKENS]):
            # The note, shown when pointing at the token, has its fate and its numbers.
            fate = _BY_LETTER[self.imitation.fates[i]]
            is_clamped = self.imitation.clamped is not None and self.imitation.clamped[i] == "c"
            ratios = self.imitation.log_ratio_to_teacher
            note = fate.name
            if ratios and ratios[i] is not None:
                note += f"; log student - log teacher {ratios[i]:+.2f}"
                note += ", clamped" if is_clamped else ""
            note += f"; advantage {self.imitation.advantages[i]:+.2f}"
            note = ENVIRONMENT.meaning if fate is ENVIRONMENT else note
            tokens.append(Token(text, fate, is_clamped, note))
        return tokens


@dataclass(frozen=True, slots=True)
class Phase:
    """The tokens of a third of the run, counted by the letters of their fates.

    "c" is counted in addition, since a clamped token also has a fate.
    """

    name: str
    steps: list[int] = field(default_factory=list)
    letters: Counter[str] = field(default_factory=Counter)

    @property
    def num_tokens(self) -> int:
        return sum(self.letters[fate.letter] for fate in FATES)

    def share(self, letter: str) -> float:
        return self.letters[letter] / self.num_tokens


@dataclass(frozen=True, slots=True)
class ImitationMap:
    """The map of one run: shares of each fate early, in the middle and late, and completions chosen
    to show them."""

    method: str
    seed: int
    phases: Sequence[Phase]
    completions: Sequence[MappedCompletion]


def imitation_maps(methods: Sequence[Method]) -> list[ImitationMap]:
    """Make a map of each method of a table whose teacher gates (the first few methods), from its
    first seed that has recorded one."""
    maps = []
    for method in methods:
        if method.config.objective.gates_by_teacher:
            found = (_map_of(method.name, run) for run in method.runs)
            maps += [each for each in found if each is not None][:1]
    return maps[:MOST_METHODS]


def latest_map(rows: Sequence[SampleRow]) -> list[MappedCompletion]:
    """List the completions that have a map, from rows of a run that may still train."""
    return [
        MappedCompletion("latest", row, rollout, rollout.imitation)
        for row in rows
        for rollout in row.rollouts
        if rollout.tokens and rollout.imitation
    ]


def _map_of(method: str, run: Run) -> ImitationMap | None:
    """Choose, for each third of the run and either sign of the advantage, the completion with the
    most gated tokens."""
    phases = {name: Phase(name) for name in PHASES}
    best: dict[tuple[str, bool], MappedCompletion] = {}
    for each in _recorded(run):
        phase = phases[each.phase]
        phase.letters.update(each.imitation.fates, c=each.num_clamped)
        phase.steps.append(each.row.step)
        # The better and the worse completion with the largest share of gated tokens.
        place = (each.phase, each.advantage > 0)
        if each.advantage and (place not in best or each.gated_share > best[place].gated_share):
            best[place] = each
    if not best:
        return None
    order = [(name, sign) for name in PHASES for sign in (True, False)]
    shown = [best[place] for place in order if place in best]
    return ImitationMap(method, run.seed, [p for p in phases.values() if p.steps], shown)


def _recorded(run: Run) -> Iterator[MappedCompletion]:
    """Yield all recorded completions, except those in damaged rows."""
    for row in read_rows(RunDirectory(run.path), SAMPLES, SampleRow):
        if isinstance(row, str):
            continue
        # Thirds of the steps; after a crash, a row beyond the last step belongs to the last third.
        third = (row.step - 1) * len(PHASES) // max(run.num_steps, 1)
        phase = PHASES[min(third, len(PHASES) - 1)]
        for rollout in row.rollouts:
            if rollout.tokens and rollout.imitation:
                yield MappedCompletion(phase, row, rollout, rollout.imitation)
