"""The `[task]` section: one class for each `type`. `several` contains other tasks."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rlad.config.types import Count, Location, Number, Positive, Section
from rlad.config.validation import validated
from rlad.errors import UserError


class KnightsAndKnavesConfig(Section):
    """Logic puzzles with exactly one solution. Splits are by puzzle structure."""

    type: Literal["knights_and_knaves"] = "knights_and_knaves"
    num_people: tuple[Annotated[int, Field(strict=True, ge=2, le=8)], ...] = Field(
        (3, 4, 5, 6, 7), min_length=1
    )
    """numbers of people in a puzzle, taken in turn"""
    instructions: bool = True
    """put the rules and the answer format before each puzzle"""
    vary_names: bool = True
    """draw the names for each puzzle; otherwise the people are always Ada, Ben, Cleo, ..."""
    reward: Literal["exact", "logic_rl"] = "exact"
    """reward 1 for a fully correct answer, or Logic-RL's format and answer reward"""


class _GeneratedConfig(Section):
    type: Any = None
    options: dict[str, Any] = Field(default={})
    """passed to reasoning-gym"""


class ArithmeticConfig(_GeneratedConfig):
    """Sums and differences (reasoning-gym's `chain_sum`)."""

    type: Literal["arithmetic"] = "arithmetic"


class CountdownConfig(_GeneratedConfig):
    """Reach a target number with given numbers (reasoning-gym's `countdown`)."""

    type: Literal["countdown"] = "countdown"


class ReasoningGymConfig(_GeneratedConfig):
    """Any data set of reasoning-gym, by name."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    """name of the reasoning-gym data set"""
    partial_credit: bool = False
    """the reward is reasoning-gym's score, instead of 1 for correct and 0 for wrong"""


class JsonlConfig(Section):
    """Your own problems: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, also `.gz`), a
    folder of such files, or a Hugging Face data set."""

    type: Literal["jsonl"] = "jsonl"
    path: Location
    """training problems; also the held-out problems if no other file is given"""
    validation_path: Location | None = None
    """held-out validation problems in a separate file"""
    test_path: Location | None = None
    """held-out test problems in a separate file"""
    prompt_field: str = "prompt"
    """field with a problem's prompt"""
    answer_field: str = "answer"
    """field with its reference answer"""
    images_field: str = "images"
    """field with a problem's pictures, if it has any: paths relative to the file, base64, or images
    of `datasets`"""
    answer_format: Literal["whole", "gsm8k", "boxed", "last"] = "whole"
    """the part of that field that is the answer: all of it, what follows the last `####`, the last
    `\\boxed{...}`, or the final answer as in a completion (`<answer>`, `Answer:`, last line)"""
    verifier: str = "exact"
    """`exact`, `number`, `math`, or your own function as `import.path:function`"""
    timeout_seconds: Positive = 5.0
    """time limit of the verifier; beyond it, this one completion is not judged"""
    max_memory_gib: Positive = 4.0
    """memory limit in the same way, beyond what the process holds at its start (Linux)"""


BOXED_INSTRUCTIONS = "Please reason step by step, and put your final answer within \\boxed{}."


class _BenchmarkConfig(Section):
    type: Any = None
    instructions: str = BOXED_INSTRUCTIONS
    """text after each question; may be empty"""


class GSM8KConfig(_BenchmarkConfig):
    """GSM8K's test set, for evaluation only."""

    type: Literal["gsm8k"] = "gsm8k"


class AIME2025Config(_BenchmarkConfig):
    """AIME 2025, I and II, for evaluation only."""

    type: Literal["aime2025"] = "aime2025"


class ScenesConfig(Section):
    """Questions about drawn scenes of one to four coloured shapes. Splits are by scene."""

    type: Literal["scenes"] = "scenes"
    kinds: tuple[Literal["count", "colour", "difference", "two steps"], ...] = Field(
        ("count", "colour", "difference", "two steps"), min_length=1
    )
    """kinds of questions, taken in turn"""
    picture_size: Annotated[int, Field(strict=True, ge=32, le=1024)] = 64
    """width and height of the pictures, in pixels"""
    instructions: bool = True
    """put the answer format before each question"""
    shown: bool = True
    """false: every picture is black, which measures what can be answered without seeing"""
    reward: Literal["answer", "perception_and_answer"] = "answer"
    """1 for a correct answer; or the mean of that and of 1 if `<perception>` names all shapes"""


SingleTaskConfig = (
    KnightsAndKnavesConfig
    | ArithmeticConfig
    | CountdownConfig
    | ReasoningGymConfig
    | JsonlConfig
    | ScenesConfig
    | GSM8KConfig
    | AIME2025Config
)


class SeveralTasksConfig(Section):
    """Problems of several tasks in turn, each graded by its own task."""

    type: Literal["several"] = "several"
    tasks: dict[
        Annotated[str, Field(min_length=1)],
        Annotated[SingleTaskConfig, Field(discriminator="type")],
    ] = Field(min_length=1)
    """tasks by name, each of any other type"""


class EpisodesConfig(Section):
    """The settings that all tasks of several turns share."""

    type: Any = None
    max_turns: Count = 10
    """most turns of the model; an episode that is not done by then is cut off"""
    max_turn_tokens: Count | None = None
    """most tokens of one turn; by default what is left of rollout.max_completion_tokens, which
    counts all that the model writes in an episode"""


class SokobanConfig(EpisodesConfig):
    """Sokoban on generated boards, each with a solution. Splits are by layout up to rotation and
    reflection."""

    type: Literal["sokoban"] = "sokoban"
    max_turns: Count = 20
    """most turns of the model; an episode that is not done by then is cut off"""
    size: Annotated[int, Field(strict=True, ge=4, le=12)] = 5
    """rows and columns of the room"""
    num_boxes: Annotated[int, Field(strict=True, ge=1, le=3)] = 1
    """number of boxes and of goals"""
    depth: tuple[Count, Count] = (2, 10)
    """fewest and most moves of the best solution; each number is equally likely on a layout"""
    wall_share: Annotated[float, Field(strict=True, ge=0.05, le=0.5)] = 0.15
    """share of the room's cells that are walls; with too few, all boards have the same layouts"""
    moves_per_turn: Count = 1
    """number of moves of one turn that are played, in order"""
    instructions: bool = True
    """put the rules and the answer format before the first board"""

    @model_validator(mode="after")
    def _check_depth(self) -> Self:
        least, most = self.depth
        if least > most:
            raise UserError(f"depth is from {least} to {most} moves; put the smaller number first")
        return self


class IslandQuestionsConfig(EpisodesConfig):
    """Knights and knaves whose statements have several solutions. The model may ask questions
    before it answers. Splits are by puzzle structure."""

    type: Literal["island_questions"] = "island_questions"
    num_people: Annotated[int, Field(strict=True, ge=2, le=6)] = 3
    """people in a puzzle"""
    num_questions: Count = 2
    """number of questions that may be asked; they always suffice"""
    vary_names: bool = False
    """draw the names for each puzzle; otherwise the people are always Ada, Ben, Cleo, ..."""
    instructions: bool = True
    """put the rules and the answer format before each puzzle"""


class EnvironmentTaskConfig(EpisodesConfig):
    """Episodes of several turns in your own environment."""

    type: Literal["environment"] = "environment"
    path: Annotated[str, Field(min_length=1)]
    """the environment's class, as `import.path:Class`"""
    options: dict[str, Any] = Field(default={})
    """keyword arguments for the class"""
    reward: Literal["sum", "last"] = "sum"
    """reward of an episode: the sum over its steps, or the reward of its last step"""
    success_reward: Number = 1.0
    """an episode with at least this reward is a success, unless its last step says `success`"""
    timeout_seconds: Positive = 10.0
    """time limit of one reset or step; beyond it, this one rollout is not judged"""
    max_memory_gib: Positive = 4.0
    """memory limit of all environments together in the same way, beyond what their process holds at
    its start (Linux)"""


TaskConfig = (
    SingleTaskConfig
    | SeveralTasksConfig
    | EnvironmentTaskConfig
    | SokobanConfig
    | IslandQuestionsConfig
)


class _Evaluation(Section):
    ood_task: Annotated[TaskConfig, Field(discriminator="type")]


class _Run(Section):
    evaluation: _Evaluation


def with_changes(task: TaskConfig, changes: dict[str, Any]) -> TaskConfig:
    """Return the task of the out-of-distribution test: `task` with some settings changed. Of
    `several` tasks it keeps only those that `changes` names. If `changes` has another `type`, the
    result is that task, without any setting of `task`.

    Raises `UserError` with one sentence for each mistake.
    """
    table = _merged(task, changes)
    tasks = table.get("tasks")
    if isinstance(task, SeveralTasksConfig) and table is not changes and isinstance(tasks, dict):
        if unknown := sorted(tasks.keys() - task.tasks):
            raise UserError(
                f"evaluation.ood_task.tasks names {unknown[0]!r}, which is not a task of the run; "
                f"use some of {', '.join(task.tasks)}."
            )
        table["tasks"] = {name: _merged(task.tasks[name], one) for name, one in tasks.items()}
    return validated(_Run, {"evaluation": {"ood_task": table}}).evaluation.ood_task


def _merged(task: TaskConfig, changes: Any) -> Any:
    """Return the task's settings with some changed, or only `changes` if it has another `type` or
    is no table."""
    is_same = isinstance(changes, dict) and changes.get("type", task.type) == task.type
    return task.model_dump() | changes if is_same else changes
