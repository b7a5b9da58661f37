"""What the teacher writes for `sft`: graded completions, and which of them are trained on when."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlad.config.run import RunConfig
from rlad.errors import RunFailedError
from rlad.models.loading import LanguageModel
from rlad.rollouts.grading import roll_out
from rlad.seeds import stream_seed
from rlad.tasks import Task, Verdict

TokenIds = tuple[int, ...]

# The rest of `optimization.max_seconds` is left for training on what was written.
_WRITING_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class TeacherData:
    """What the teacher wrote for a run and which of it is trained on when."""

    sequences: list[tuple[TokenIds, TokenIds]]
    """(prompt, completion) of each completion that is trained on"""
    steps: list[list[int]]
    """the sequences of each optimiser step, longest first"""
    tokens_written: list[int]
    """by the teacher, for each rollout batch"""
    accepted_share: float
    seconds: float


def write_teacher_data(
    config: RunConfig, task: Task, *, teacher: LanguageModel, student: LanguageModel, before_work: Callable[[], None]
) -> TeacherData:
    """As many completions as the RL methods sample, for the same prompts, by the teacher; with `rejection` the correct ones.

    Writing ends early at `max_teacher_tokens`, and when half of `max_seconds` is used. Raises `RunFailedError` when no
    completion is left.
    """
    assert config.objective.type == "sft"
    loop, rollout, started = config.optimization, config.rollout, time.monotonic()
    sequences: list[tuple[TokenIds, TokenIds]] = []
    tokens_written: list[int] = []
    num_written = 0
    for index in range(-(-loop.num_steps // loop.steps_per_rollout_batch)):
        groups = roll_out(
            config,
            task,
            range(index * rollout.prompts_per_batch, (index + 1) * rollout.prompts_per_batch),
            writer=teacher,
            student=student,
            seed=stream_seed(config.seed, "teacher rollouts", index),
            seconds={},
            before_work=before_work,
        )
        pairs = [(group.prompt_token_ids, rollout) for group in groups for rollout in group.rollouts]
        accepted = [pair for pair in pairs if pair[1].verdict == Verdict.CORRECT or not config.objective.rejection]
        sequences += [(prompt, rollout.completion.token_ids) for prompt, rollout in accepted]
        num_written += len(pairs)
        tokens_written.append(sum(len(rollout.completion.token_ids) for _, rollout in pairs))
        seconds = time.monotonic() - started
        if loop.max_seconds is not None and seconds >= _WRITING_SHARE * loop.max_seconds:
            break
        if loop.max_teacher_tokens is not None and sum(tokens_written) >= loop.max_teacher_tokens:
            break
    if not sequences:
        raise RunFailedError(
            f"the verifier calls none of the teacher's {num_written} completions correct, so objective 'sft' has nothing to "
            "train on; use a better teacher or easier problems, or set objective.rejection=false."
        )
    steps = _steps([len(prompt) + len(completion) for prompt, completion in sequences], config)
    return TeacherData(sequences, steps, tokens_written, len(sequences) / num_written, time.monotonic() - started)


def sequences_per_step(config: RunConfig) -> int:
    """How many completions one optimiser step is made on."""
    return config.rollout.prompts_per_batch // config.optimization.steps_per_rollout_batch * config.rollout.group_size


def _steps(lengths: Sequence[int], config: RunConfig) -> list[list[int]]:
    """The sequences of each step: all of them in a seeded order, then all of them in another one, until there are enough."""
    size, num_steps = sequences_per_step(config), config.optimization.num_steps
    order: list[int] = []
    while len(order) < size * num_steps:
        epoch = len(order) // len(lengths)
        generator = torch.Generator().manual_seed(stream_seed(config.seed, "sft order", epoch))
        order += torch.randperm(len(lengths), generator=generator).tolist()
    # Sorted, so that the micro-batches hold sequences of similar length; the step is over all of them in any order.
    steps = (order[step * size : (step + 1) * size] for step in range(num_steps))
    return [sorted(step, key=lambda i: -lengths[i]) for step in steps]


def micro_batch_rows(num_rows: int, longest: int, tokens_per_batch: int) -> int:
    """Rows of a micro-batch: the most that divide `num_rows` and stay within `tokens_per_batch`; at least 1."""
    fitting = max(1, tokens_per_batch // longest)
    return max(rows for rows in range(1, num_rows + 1) if num_rows % rows == 0 and (rows <= fitting or rows == 1))
