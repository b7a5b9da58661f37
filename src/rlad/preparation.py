"""What a run needs before its first step: a verifier that works, prompts that fit, and its models.

Imports torch where models are loaded: a check without models needs the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlad.config import RunConfig
from rlad.model_files import is_adapter, require_peft
from rlad.plain_tokenizer import AnyTokenizer
from rlad.prompts import check_prompt_length, prompt_token_ids
from rlad.seeds import stream_seed
from rlad.tasks import Split, Task, Verdict
from rlad.tasks.several import SeveralTasks
from rlad.teacher_config import LocalTeacherConfig
from rlad.teachers import Setting, Teacher, check_teacher, make_teacher, require_no_error

if TYPE_CHECKING:
    from rlad.language_model import LanguageModel

NUM_PROBED_PROBLEMS, NUM_PROBED_ANSWERS = 20, 5


def require_working_verifier(task: Task) -> None:
    """`ValueError` when the verifier cannot judge even the reference answers of the first problems; of several tasks, one's."""
    if isinstance(task, SeveralTasks):
        for one in task.tasks.values():
            require_working_verifier(one)
        return
    problems = [task.problem("train", i) for i in range(NUM_PROBED_ANSWERS)]
    judgements = [task.judge(problem, problem.answer) for problem in problems]
    if all(judgement.verdict == Verdict.CANNOT_JUDGE for judgement in judgements):
        raise ValueError(
            f"the verifier of task {task.name!r} cannot judge the reference answers of the first {len(problems)} training "
            f"problems ({judgements[0].reason}); mend the verifier or the answers."
        )


def longest_prompt(
    config: RunConfig,
    task: Task,
    tokenizer: AnyTokenizer,
    context_tokens: int | None,
    ood_task: Task | None = None,
) -> int:
    """Tokens of the longest prompt: of all that a finite task will give, of the first few of an endless one.

    Raises `ValueError` when one leaves no room for its completion.
    """
    loop, rollout, evaluation = config.optimization, config.rollout, config.evaluation
    num_batches = -(-loop.num_steps // loop.steps_per_rollout_batch)
    wanted: list[tuple[str, Task, Split, int]] = [
        ("train", task, "train", num_batches * rollout.prompts_per_batch),
        ("validation", task, "validation", evaluation.num_validation_problems),
        ("test", task, "test", evaluation.num_test_problems),
    ]
    if ood_task is not None:
        wanted.append(("out-of-distribution test", ood_task, "test", evaluation.num_ood_problems))
    longest = 0
    for name, source, split, number in wanted:
        for i in range(min(number, source.num_problems(split) or NUM_PROBED_PROBLEMS)):
            problem = source.problem(split, i, seed=config.seed if split == "train" else 0)
            prompt = prompt_token_ids(tokenizer, problem.asked, rollout)
            check_prompt_length(len(prompt), f"{name} problem {i}", rollout, context_tokens)
            longest = max(longest, len(prompt))
    return longest


def setting_of(config: RunConfig, student: LanguageModel, before_work: Callable[[], None] = lambda: None) -> Setting:
    """What a teacher has to work with."""
    return Setting(config, student.tokenizer, student.context_tokens, student, before_work)


def load_teacher(config: RunConfig, student: LanguageModel) -> LanguageModel:
    """The model of a local teacher. `ValueError` when it cannot score this student's tokens."""
    settings, setting = config.teacher, setting_of(config, student)
    assert isinstance(settings, LocalTeacherConfig), "RunConfig refuses other teachers where the model itself is needed"
    require_no_error(settings, check_teacher(settings, setting))
    from rlad.teachers.local import load_teacher_model

    return load_teacher_model(settings, setting)


def prepare_teacher(
    config: RunConfig, student: LanguageModel, before_work: Callable[[], None] = lambda: None
) -> Teacher | None:
    """The teacher of an objective of ours that needs one, or None. `ValueError` when it cannot score this student's tokens.

    `before_work` is called before each piece of its work; it may raise to stop the run there.
    """
    if not config.needs_teacher:
        return None
    assert config.teacher is not None, "RunConfig refuses an objective that needs a teacher without one"
    return make_teacher(config.teacher, setting_of(config, student, before_work))


def load_student(config: RunConfig, checkpoint: Path | None = None) -> LanguageModel:
    """The model to be trained: the initial student, or what a checkpoint holds of it. `ValueError` when that cannot be."""
    from rlad.language_model import load_language_model

    settings = config.student
    if checkpoint is None:
        require_base_model(config)
    return load_language_model(
        str(checkpoint or settings.model),
        dtype=settings.dtype,
        device=settings.device,
        trainable=True,
        lora=None if checkpoint else settings.lora,
        seed=stream_seed(config.seed, "lora"),
        end_tokens=settings.end_tokens,
    )


def require_base_model(config: RunConfig) -> None:
    """`ValueError` when the student to be trained is an adapter, or its adapter cannot be made."""
    if is_adapter(config.student.model):
        raise ValueError(
            f"student.model = {config.student.model!r} is a LoRA adapter, and a run starts from a whole model; merge it into "
            "its base model (PEFT's merge_and_unload) and give the folder of the result."
        )
    if config.student.lora:
        require_peft("[student.lora]")


def load_reference(config: RunConfig, student: LanguageModel) -> LanguageModel:
    """The frozen initial student: a second copy of it, or a LoRA student itself, whose base weights it is."""
    return student if config.student.lora else load_student(config)
