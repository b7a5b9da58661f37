"""The sentences of a report. They claim no more than the intervals and corrected p-values show."""

from collections.abc import Sequence

from rlad.comparison.comparable import Group
from rlad.comparison.figures import Method
from rlad.comparison.verdict import FEWEST_SEEDS

HOW_TO_READ = (
    "Intervals are 95 % bootstrap intervals over seeds and problems, resampled independently; "
    "problems of one structure are resampled together. With one seed they are over problems only. "
    "The difference to the baseline is over the same problems and seeds. The p-value is "
    "conditional on these trained runs: it tests whether the results on each prompt could be "
    "exchanged between the two methods. “p, Holm” is corrected for the comparisons of its table. "
    "The verdict follows the interval: a method is ahead or behind if its interval excludes 0; "
    "this is established with three seeds or more and a corrected p below .05, otherwise it is a "
    "hint. A small p with an interval that includes 0 means that these runs differ, but that runs "
    "with other seeds may not. The difference that a comparison could have detected is computed "
    "from the spread over its own seeds and problems. An interval without width, such as "
    "[0.0, 0.0], means that all resamples gave the same value, not that the value is certain. A "
    "learning curve is drawn at the steps that all seeds of its method have."
)
HOW_TO_READ_CURVES = "Lines: mean over seeds. Bands: from the lowest to the highest seed."
HOW_TO_READ_MAP = (
    "The reward sets the direction of the update, the teacher decides whether a token follows it. "
    "For the early, middle and late part of the run, the map shows the completion with positive "
    "and the one with negative advantage that have the largest share of tokens held back or "
    "protected by the teacher; the table shows how rare such tokens are. One prompt of every step "
    "is recorded. Point at a token to see its numbers."
)


def warnings(methods: Sequence[Method], baseline: Method, chosen: str | None) -> list[str]:
    """List what a reader must know before trusting the table. `chosen` is the requested
    baseline."""
    told = []
    if chosen and chosen not in (baseline.name, baseline.runs[0].method) and len(methods) > 1:
        told.append(
            f"This table has no run of {chosen}, the chosen baseline; its methods are compared "
            f"with {baseline.name}."
        )
    few = [f"{m.name} ({len(m.runs)})" for m in methods if len(m.runs) < FEWEST_SEEDS]
    if few:
        told.append(
            f"Fewer than {FEWEST_SEEDS} seeds: {', '.join(few)}. With one seed the interval is "
            "over problems only; with two its estimate of the spread over seeds is poor. Other "
            "seeds may be outside of it."
        )
    unlike = [m.name for m in methods if m.to_baseline and not m.to_baseline.is_paired_by_seed]
    if unlike:
        told.append(
            "No seeds in common with the baseline, so the difference is not paired by seed: "
            f"{', '.join(unlike)}."
        )
    return told


def splits(group: Group, *, is_tuned: bool) -> str:
    """Say which problems were used for selection, and which are reported."""
    run = group.first
    evaluation = run.config.evaluation
    validations = run.history.validations
    num_problems = len(validations[-1].results) if validations else 0
    rates = ", and selected the learning rates (see the notes)" if is_tuned else ""
    text = (
        f"Selection: the validation split ({num_problems} problems x "
        f"{evaluation.num_validation_samples} completions) selects the best checkpoint of a run"
        f"{rates}. Report: the test split ({len(run.after)} problems x "
        f"{run.after[0].num_samples} completions), which selects nothing. The tables show the "
        "student before training and after the last step, not the best checkpoint."
    )
    if run.ood_after:
        changed = ", ".join(f"{key} = {value}" for key, value in evaluation.ood_task.items())
        text += (
            f" Out of distribution: {len(run.ood_after)} problems x {run.ood_after[0].num_samples} "
            f"completions of the same task with {changed}."
        )
    return f"{text} Prompts and sampling seeds are the same for all methods."


def what_is_shared(group: Group) -> str:
    """Return task, student and budget of a table in one sentence."""
    config = group.first.config
    loop = config.optimization
    rollout = config.rollout
    budget = [f"{loop.num_steps} steps"]
    if loop.max_seconds:
        budget.append(f"at most {loop.max_seconds:g} seconds")
    if loop.max_teacher_tokens:
        budget.append(f"at most {loop.max_teacher_tokens:,} teacher tokens")
    return (
        f"Task {config.task.type}, student {config.student.model}; {', '.join(budget)}, "
        f"{rollout.prompts_per_batch} prompts x {rollout.group_size} rollouts (at most "
        f"{rollout.max_completion_tokens} tokens)."
    )


def not_comparable(groups: Sequence[Group]) -> list[str]:
    """Say why the runs are in several tables; empty if they are in one."""
    return [
        f"Table {i} is not comparable with table 1. Differences (table 1 and table {i}): "
        f"{'; '.join(groups[0].differences(group))}."
        for i, group in enumerate(groups[1:], start=2)
    ]


def cost_notes(methods: Sequence[Method]) -> list[str]:
    """Explain shares of the cost table that would mislead for some methods."""
    kinds = {
        "the teacher runs inside the update, so its time is part of the update's.": [
            m.name for m in methods if m.config.objective.asked_of_teacher != "sampled"
        ],
        "the student samples nothing; the teacher writes the completions.": [
            m.name for m in methods if m.config.objective.written_by == "teacher"
        ],
    }
    return [f"{', '.join(names)}: {note}" for note, names in kinds.items() if names]
