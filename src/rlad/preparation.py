"""What a run needs before its first step: a verifier that works, prompts that fit, and its models."""

from transformers import PreTrainedTokenizerBase

from rlad.config import RunConfig
from rlad.language_model import LanguageModel, context_tokens, load_language_model, load_model_config, load_tokenizer
from rlad.prompts import check_prompt_length, prompt_token_ids
from rlad.seeds import stream_seed
from rlad.tasks import Split, Task, Verdict
from rlad.teachers import Teacher
from rlad.teachers.compatibility import compare_contexts, compare_tokenizers
from rlad.teachers.local import LocalTeacher

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


def load_teacher(config: RunConfig, student: LanguageModel) -> LanguageModel:
    """The teacher's model. `ValueError` when it cannot score this student's tokens."""
    settings = config.teacher
    assert settings is not None, "RunConfig refuses an objective that needs a teacher without one"
    context = context_tokens(load_model_config(settings.model))
    findings = compare_tokenizers(student.tokenizer, load_tokenizer(settings.model))
    for finding in (*findings, compare_contexts(config.rollout, student.context_tokens, context)):
        if finding.level == "error":
            raise ValueError(f"teacher {settings.model!r} cannot score the student's tokens: {finding.message}")
    return load_language_model(
        settings.model,
        dtype=settings.dtype,
        device=str(student.model.device) if settings.device == "auto" else settings.device,
        random_weights_seed=stream_seed(config.seed, "random teacher", 0) if settings.random_weights else None,
    )


def make_teacher(config: RunConfig, student: LanguageModel) -> Teacher | None:
    """The teacher of an objective of ours that needs one, or None. `ValueError` when it cannot score this student's tokens."""
    if not config.needs_teacher:
        return None
    assert config.teacher is not None
    return LocalTeacher(
        load_teacher(config, student),
        temperature=config.rollout.temperature,
        tokens_per_batch=config.teacher.tokens_per_batch,
    )


def load_reference(config: RunConfig) -> LanguageModel:
    """The frozen initial student."""
    return load_language_model(config.student.model, dtype=config.student.dtype, device=config.student.device, trainable=True)
