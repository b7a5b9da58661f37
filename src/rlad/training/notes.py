"""Notes on what a run does differently from what its settings may suggest."""

from collections.abc import Iterator

from rlad.config.run import RunConfig
from rlad.config.task import KnightsAndKnavesConfig
from rlad.models.files import EMBEDDED
from rlad.tasks import Split, Task


def notes_on(config: RunConfig, task: Task, ood_task: Task | None = None) -> Iterator[str]:
    """Yield a sentence for each note; `rlad check` shows it as a warning, `rlad train` at the
    start."""
    evaluation = config.evaluation
    sizes: list[tuple[str, Task, Split]] = [
        ("num_validation_problems", task, "validation"),
        ("num_test_problems", task, "test"),
    ]
    if ood_task is not None:
        sizes.append(("num_ood_problems", ood_task, "test"))
    for setting, source, split in sizes:
        wanted = getattr(evaluation, setting)
        there = source.num_problems(split)
        if there is not None and there < wanted:
            yield f"evaluation.{setting} = {wanted}, but there are {there}: all of them are used."
    section = config.task
    is_embedded = config.student.model in EMBEDDED
    if is_embedded and isinstance(section, KnightsAndKnavesConfig) and section.instructions:
        yield (
            f"{config.student.model} has learned puzzles without instructions, and solves next to "
            "none with them; set task.instructions = false and task.vary_names = false, as the "
            "embedded run has it."
        )
