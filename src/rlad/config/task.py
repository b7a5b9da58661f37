"""The `[task]` section: one class for each `type`. `several` holds tasks of its own."""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from rlad.config.types import Positive, Section
from rlad.errors import UserError


class KnightsAndKnavesConfig(Section):
    """Logic puzzles with exactly one solution; the split is by puzzle structure."""

    type: Literal["knights_and_knaves"] = "knights_and_knaves"
    num_people: tuple[Annotated[int, Field(strict=True, ge=2, le=8)], ...] = Field(
        (3, 4, 5, 6, 7), min_length=1
    )
    """sizes of the puzzles, taken in turn"""
    instructions: bool = True
    """put the rules and the answer format before each puzzle"""
    vary_names: bool = True
    """draw the names of each puzzle; else the people are always called Ada, Ben, Cleo, ..."""
    reward: Literal["exact", "logic_rl"] = "exact"
    """1 for a fully right answer, or Logic-RL's format and answer reward"""


class ArithmeticConfig(Section):
    """Sums and differences (reasoning-gym's `chain_sum`)."""

    type: Literal["arithmetic"] = "arithmetic"
    options: dict[str, Any] = Field(default={})
    """passed to reasoning-gym"""


class CountdownConfig(Section):
    """Reach a target number with given numbers (reasoning-gym's `countdown`)."""

    type: Literal["countdown"] = "countdown"
    options: dict[str, Any] = Field(default={})
    """passed to reasoning-gym"""


class ReasoningGymConfig(Section):
    """Any data set of reasoning-gym by name."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    """name of the reasoning-gym data set"""
    options: dict[str, Any] = Field(default={})
    """passed to reasoning-gym"""
    partial_credit: bool = False
    """reward = reasoning-gym's score instead of 1 for right and 0 for wrong"""


class JsonlConfig(Section):
    """Your own problems: a `.jsonl` file or a Hugging Face data set."""

    type: Literal["jsonl"] = "jsonl"
    path: str
    """the training problems, and the held-out ones where no other file is given"""
    validation_path: str | None = None
    """held-out problems in a file of their own"""
    test_path: str | None = None
    """the same"""
    prompt_field: str = "prompt"
    """the field with a problem's prompt"""
    answer_field: str = "answer"
    """the field with its reference answer"""
    verifier: str = "exact"
    """`exact`, `number`, `math`, or `import.path:function` of your own"""
    timeout_seconds: Positive = 5.0
    """a verifier that takes longer costs one completion"""
    max_memory_gib: Positive = 4.0
    """so does one that needs more, beyond what its process holds at its start (Linux)"""


class _BenchmarkConfig(Section):
    instructions: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """after each question; may be empty"""


class GSM8KConfig(_BenchmarkConfig):
    """GSM8K's test set, for evaluation alone."""

    type: Literal["gsm8k"] = "gsm8k"


class AIME2025Config(_BenchmarkConfig):
    """AIME 2025, I and II, for evaluation alone."""

    type: Literal["aime2025"] = "aime2025"


SingleTaskConfig = (
    KnightsAndKnavesConfig
    | ArithmeticConfig
    | CountdownConfig
    | ReasoningGymConfig
    | JsonlConfig
    | GSM8KConfig
    | AIME2025Config
)


class SeveralTasksConfig(Section):
    """Problems of several tasks in turn, each graded by its own."""

    type: Literal["several"] = "several"
    tasks: dict[
        Annotated[str, Field(min_length=1)],
        Annotated[SingleTaskConfig, Field(discriminator="type")],
    ] = Field(min_length=1)
    """by name: each a task of any other type"""


TaskConfig = SingleTaskConfig | SeveralTasksConfig
_ANY_TASK: TypeAdapter[TaskConfig] = TypeAdapter(Annotated[TaskConfig, Field(discriminator="type")])


def with_changes(task: TaskConfig, changes: dict[str, Any], where: str) -> TaskConfig:
    """A task with some settings changed; of several, those tasks alone that `changes` names. With
    another `type` it is that task, and nothing of the first.

    Raises `UserError` with one sentence about the key below `where` that does not fit.
    """
    is_another = changes.get("type", task.type) != task.type
    if isinstance(task, SeveralTasksConfig) and not is_another:
        named = changes.get("tasks") if set(changes) == {"tasks"} else None
        are_settings = isinstance(named, dict) and all(
            isinstance(changed, dict) for changed in named.values()
        )
        if not (named and are_settings and named.keys() <= task.tasks.keys()):
            raise UserError(
                f"{where} is {changes}: for a task of type 'several' it is "
                f"{{ tasks = {{ NAME = {{ ... }} }} }}, with names "
                f"among {', '.join(task.tasks)}"
            )
        tasks = {
            name: with_changes(task.tasks[name], changed, f"{where}.tasks.{name}")
            for name, changed in named.items()
        }
        return SeveralTasksConfig.model_validate({"tasks": tasks})
    try:
        if is_another:
            return _ANY_TASK.validate_python(changes)
        return type(task).model_validate(task.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        named_type = changes.get("type", task.type)
        key = ".".join(str(part) for part in (where, *first["loc"]) if part != named_type)
        raise UserError(
            f"{key} does not fit a task of type {named_type!r}: {first['msg']}"
        ) from None
