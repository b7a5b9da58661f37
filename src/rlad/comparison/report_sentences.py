"""The sentences of a report. They claim no more than the intervals and corrected p-values show."""

from collections.abc import Sequence

from rlad.comparison.comparable import Group
from rlad.comparison.figures import Method
from rlad.comparison.verdict import FEWEST_SEEDS

HOW_TO_READ = (
    "Intervals are 95 % bootstrap intervals over seeds and problems, resampled independently; "
    "problems of one structure are resampled together. With one seed they are over problems alone. "
    "The difference to the baseline is taken on the same problems and seeds. The p-value asks "
    "less: whether, for these trained runs, the results on each prompt could as well be the other "
    "method's. “p, Holm” is corrected for the comparisons of its table. The verdict follows the "
    "interval: a method is ahead or behind when its interval leaves 0 out; that is established "
    "with three seeds or more and a corrected p below .05, and else a hint. A small p beside an "
    "interval that holds 0 means that these runs differ, and other seeds need not. What a "
    "comparison could have seen is a calculation from the spread over its own seeds and problems. "
    "An interval without width, such as [0.0, 0.0], says that all resamples gave the same, not "
    "that the figure is certain. A learning curve is drawn at the steps that all seeds of its "
    "method have."
)
HOW_TO_READ_CURVES = "Lines: mean over seeds. Bands: from the lowest to the highest seed."
HOW_TO_READ_MAP = (
    "The reward decides the direction, the teacher whether a token follows it. Shown are, early, "
    "in the middle and late in the run, the better and the worse completion with the largest share "
    "of tokens that the teacher held back or protected; the table says how rare such tokens are. "
    "Recorded is one prompt of every step. Point at a token for its numbers."
)


def warnings(methods: Sequence[Method], baseline: Method, chosen: str | None) -> list[str]:
    """List what a reader must know before trusting the table. `chosen` is the requested
    baseline."""
    told = []
    if chosen and chosen not in (baseline.name, baseline.runs[0].method) and len(methods) > 1:
        told.append(
            f"No run of {chosen}, the chosen baseline, is in this table: its methods are compared "
            f"with {baseline.name}."
        )
    few = [f"{m.name} ({len(m.runs)})" for m in methods if len(m.runs) < FEWEST_SEEDS]
    if few:
        told.append(
            f"Fewer than {FEWEST_SEEDS} seeds: {', '.join(few)}. The interval of a method with one "
            "seed is over problems alone; with two it hardly knows how much seeds differ. Another "
            "seed may well be outside."
        )
    unlike = [m.name for m in methods if m.to_baseline and not m.to_baseline.is_paired_by_seed]
    if unlike:
        told.append(
            "No seed in common with the baseline, so the difference is not paired by seed: "
            f"{', '.join(unlike)}."
        )
    return told


def splits(group: Group, *, is_tuned: bool) -> str:
    """Say which problems were used for selection, and which are reported."""
    run = group.first
    evaluation = run.config.evaluation
    validations = run.history.validations
    num_problems = len(validations[-1].results) if validations else 0
    rates = ", and chose the learning rates, as the notes say" if is_tuned else ""
    text = (
        f"Selection: the validation split ({num_problems} problems x "
        f"{evaluation.num_validation_samples} completions) chooses the checkpoint that a run keeps "
        f"as its best{rates}. Report: the test split ({len(run.after)} problems x "
        f"{run.after[0].num_samples} completions), which chooses nothing. The tables show the "
        "student before training and after the last step, not the best checkpoint."
    )
    if run.ood_after:
        changed = ", ".join(f"{key} = {value}" for key, value in evaluation.ood_task.items())
        text += (
            f" Out of distribution: {len(run.ood_after)} problems x {run.ood_after[0].num_samples} "
            f"completions of the same task with {changed}."
        )
    return f"{text} Prompts and sampling seeds are the same for all."


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
        f"Table {i} is not comparable with table 1. They differ in (table 1 and table {i}) "
        f"{'; '.join(groups[0].differences(group))}."
        for i, group in enumerate(groups[1:], start=2)
    ]


def cost_notes(methods: Sequence[Method]) -> list[str]:
    """Say what the shares in the cost table hide for some methods."""
    kinds = {
        "the teacher works inside the update, so its time is part of the update's.": [
            m.name for m in methods if m.config.objective.asked_of_teacher != "sampled"
        ],
        "the student samples nothing; the teacher writes the completions.": [
            m.name for m in methods if m.config.objective.written_by == "teacher"
        ],
    }
    return [f"{', '.join(names)}: {note}" for note, names in kinds.items() if names]
