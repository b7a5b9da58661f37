"""What came out, in words: no more than the intervals and the corrected p-values say."""

from collections.abc import Sequence

from rlad.comparison.comparable import Group, Method
from rlad.comparison.methods import MethodFigures
from rlad.comparison.tables import p_text, signed
from rlad.runs.statistics import Estimate

FEWEST_SEEDS = 3
_LEVEL = 0.05


def headline(figures: Sequence[MethodFigures], baseline: str) -> str:
    """The best method, and which methods the data tell apart from the baseline."""
    best = max(figures, key=lambda f: f.after.mean)
    text = f"{_over(best)}, {best.name} reaches {_figure(best)} pass@1 on the test split"
    if len(figures) == 1:
        return f"{text}; it starts at {best.before.mean:.1%}, so it gains {_difference(best.gain)}."
    text += ", the highest mean"
    compared = [f for f in figures if f.to_baseline]
    if best.to_baseline:
        reference = next(f for f in figures if f.name == baseline)
        text += (
            f"; {baseline} reaches {_figure(reference)}. The difference is "
            f"{_difference(best.to_baseline.difference)}, "
            f"p = {p_text(best.corrected_p)}".replace("= <", "<")
        )
        text += f" after correction for {len(compared)} comparisons" if len(compared) > 1 else ""
    return f"{text}. {_verdicts(compared, baseline)}"


def _verdicts(compared: Sequence[MethodFigures], baseline: str) -> str:
    """Who is ahead of the baseline, who behind, and who cannot be told from it."""
    kinds = {"ahead of it": [], "behind it": [], "not told apart from it by these data": []}
    for f in compared:
        assert f.to_baseline is not None
        interval = f.to_baseline.difference
        is_clear = f.corrected_p < _LEVEL and (interval.low > 0 or interval.high < 0)
        kind = (
            "not told apart from it by these data"
            if not is_clear
            else "ahead of it"
            if interval.low > 0
            else "behind it"
        )
        kinds[kind].append(f.name)
    said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    few = [f.name for f in compared if f.to_baseline and f.to_baseline.num_seeds < FEWEST_SEEDS]
    told = (
        f" With so few seeds, what is said of {', '.join(few)} is about the trained runs alone."
        if few
        else ""
    )
    return f"Compared with {baseline}, {said}.{told}"


def warnings(figures: Sequence[MethodFigures], baseline: Method, chosen: str | None) -> list[str]:
    """What a reader must know before believing the table. `chosen`: the baseline that was asked
    for."""
    told = []
    if chosen and chosen not in (baseline.name, baseline.runs[0].method) and len(figures) > 1:
        told.append(
            f"No run of {chosen}, the chosen baseline, is in this table: its methods are compared "
            f"with {baseline.name}."
        )
    few = [f for f in figures if len(f.method.runs) < FEWEST_SEEDS]
    if few:
        names = ", ".join(f"{f.name} ({len(f.method.runs)})" for f in few)
        told.append(
            f"Fewer than {FEWEST_SEEDS} seeds: {names}. The interval of a method with one seed is "
            "over problems alone; with "
            "two it hardly knows how much seeds differ. Another seed may well fall outside."
        )
    unlike = [f.name for f in figures if f.to_baseline and not f.to_baseline.is_paired_by_seed]
    if unlike:
        told.append(
            "No seed in common with the baseline, so the difference is not paired by seed: "
            f"{', '.join(unlike)}."
        )
    return told


def splits(group: Group, *, is_tuned: bool) -> str:
    """Which problems chose something, and which are reported."""
    run = group.first
    samples = run.config.evaluation.num_validation_samples
    text = (
        f"Selection: the validation split ({run.num_validation_problems} problems x {samples} "
        "completions) chooses the "
        "checkpoint that a run keeps as its "
        f"best{', and chose the learning rates, as the notes say' if is_tuned else ''}. "
        f"Report: the test split ({len(run.after)} problems x {run.after[0].num_samples} "
        "completions), which chooses nothing. "
        "The tables show the student before training and after the last step, not the best "
        "checkpoint."
    )
    if run.ood_after:
        text += f" Out of distribution: {len(run.ood_after)} problems x {run.ood_after[0].num_samples} completions"
        changed = ", ".join(
            f"{key} = {value}" for key, value in run.config.evaluation.ood_task.items()
        )
        text += f" of the same task with {changed}."
    return f"{text} Prompts and sampling seeds are the same for all."


def what_is_shared(group: Group) -> str:
    """Task, student and budget of a table in one sentence."""
    run, loop, rollout = (
        group.first.config,
        group.first.config.optimization,
        group.first.config.rollout,
    )
    limits = [f"at most {loop.max_seconds:g} seconds"] if loop.max_seconds else []
    limits += (
        [f"at most {loop.max_teacher_tokens:,} teacher tokens"] if loop.max_teacher_tokens else []
    )
    return (
        f"Task {run.task.type}, student {run.student.model}; "
        f"{', '.join([f'{loop.num_steps} steps', *limits])}, "
        f"{rollout.prompts_per_batch} prompts x {rollout.group_size} rollouts (at most "
        f"{rollout.max_completion_tokens} tokens)."
    )


def not_comparable(groups: Sequence[Group]) -> list[str]:
    """Why the runs stand in several tables; nothing when they stand in one."""
    return [
        f"Table {i} is not comparable with table 1. They differ in (table 1 and table {i}) "
        f"{'; '.join(groups[0].differences(group))}."
        for i, group in enumerate(groups[1:], start=2)
    ]


def cost_notes(figures: Sequence[MethodFigures]) -> list[str]:
    """What the shares of the cost table do not say of some methods."""
    inside, written = [], []
    for method in figures:
        objective = method.method.runs[0].config.objective
        if objective.needs_vocabulary:
            inside.append(method.name)
        if objective.written_by == "teacher":
            written.append(method.name)
    notes = []
    if inside:
        notes.append(
            f"{', '.join(inside)}: the teacher works inside the update, so its time is part of the "
            "update's."
        )
    if written:
        notes.append(
            f"{', '.join(written)}: the student samples nothing; the teacher writes the completions."
        )
    return notes


def _over(figures: MethodFigures) -> str:
    count = len(figures.method.runs)
    return f"Over {count} seeds" if count > 1 else "With one seed"


def _figure(figures: MethodFigures) -> str:
    return (
        f"{figures.after.mean:.1%} [{100 * figures.after.low:.1f}, {100 * figures.after.high:.1f}]"
    )


def _difference(estimate: Estimate) -> str:
    return f"{signed(estimate.mean)} points [{signed(estimate.low)}, {signed(estimate.high)}]"
