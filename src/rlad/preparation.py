"""What a run needs before its first step: a verifier that works, prompts that fit, and its models."""

from transformers import PreTrainedTokenizerBase

from rlad.config import RunConfig
from rlad.language_model import LanguageModel, load_language_model
from rlad.prompts import check_prompt_length, prompt_token_ids
from rlad.tasks import Split, Task, Verdict
from rlad.teacher_config import LocalTeacherConfig
from rlad.teachers import Setting, Teacher, check_teacher, make_teacher, require_no_error
from rlad.teachers.local import load_teacher_model

NUM_PROBED_PROBLEMS, NUM_PROBED_ANSWERS = 20, 5


def require_working_verifier(task: Task) -> None:
    """`ValueError` when the verifier cannot judge even the reference answers of the first problems."""
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
    tokenizer: PreTrainedTokenizerBase,
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
            prompt = prompt_token_ids(tokenizer, problem.prompt, rollout.prompt_format)
            check_prompt_length(len(prompt), f"{name} problem {i}", rollout, context_tokens)
            longest = max(longest, len(prompt))
    return longest


def setting_of(config: RunConfig, student: LanguageModel) -> Setting:
    """What a teacher has to work with."""
    return Setting(config, student.tokenizer, student.context_tokens, student)


def load_teacher(config: RunConfig, student: LanguageModel) -> LanguageModel:
    """The model of a local teacher. `ValueError` when it cannot score this student's tokens."""
    settings, setting = config.teacher, setting_of(config, student)
    assert isinstance(settings, LocalTeacherConfig), "RunConfig refuses other teachers where the model itself is needed"
    require_no_error(settings, check_teacher(settings, setting))
    return load_teacher_model(settings, setting)


def prepare_teacher(config: RunConfig, student: LanguageModel) -> Teacher | None:
    """The teacher of an objective of ours that needs one, or None. `ValueError` when it cannot score this student's tokens."""
    if not config.needs_teacher:
        return None
    assert config.teacher is not None, "RunConfig refuses an objective that needs a teacher without one"
    return make_teacher(config.teacher, setting_of(config, student))


def load_reference(config: RunConfig) -> LanguageModel:
    """The frozen initial student."""
    return load_language_model(config.student.model, dtype=config.student.dtype, device=config.student.device, trainable=True)
