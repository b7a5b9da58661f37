"""The whole method in one file: sample, reward, advantage, teacher, TRRD, step.

Only the puzzles and the embedded models come from rlad; engine and objective are here. Read this
file first, and copy from it. `rlad train` does the same, faster and for real models, and tests hold
the two equal.

    python examples/02_tiny_loop.py                                     # a few minutes on two cores
    python examples/02_tiny_loop.py --student my/student --teacher my/teacher
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlad.models.files import EMBEDDED
from rlad.tasks.logic import KnightsAndKnaves

PROMPTS_PER_STEP = 16
GROUP_SIZE = 8
MAX_COMPLETION_TOKENS = 320


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--student", default=str(EMBEDDED["embedded/student"]), help="folder or Hugging Face name"
    )
    parser.add_argument(
        "--teacher", default=str(EMBEDDED["embedded/teacher"]), help="of the same tokenizer family"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="1 is GRPO, 0 is anchored to the teacher alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.student, padding_side="left")
    if AutoTokenizer.from_pretrained(options.teacher).get_vocab() != tokenizer.get_vocab():
        raise SystemExit(
            "The teacher scores the student's token ids: both must have the same tokenizer."
        )
    # eval() all the time: with dropout, student and old policy would be two different functions.
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).eval()
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)
    task = KnightsAndKnaves(num_people=(2, 3, 3), instructions=False, vary_names=False)

    for step in range(options.steps):
        # 1. Sample a group of completions for each prompt from the student.
        problems = [
            task.problem("train", step * PROMPTS_PER_STEP + i, seed=options.seed)
            for i in range(PROMPTS_PER_STEP)
        ]
        repeated = [problem for problem in problems for _ in range(GROUP_SIZE)]
        ids, attention_mask, mask = generate(
            student, tokenizer, [problem.prompt for problem in repeated]
        )

        # 2. Reward: the verifier reads the text and says right (1) or wrong (0).
        texts = tokenizer.batch_decode(ids[:, -mask.shape[1] :], skip_special_tokens=True)
        rewards = torch.tensor(
            [
                task.judge(problem, text).reward
                for problem, text in zip(repeated, texts, strict=True)
            ]
        )

        # 3. Advantage: how much better than the other completions of the same prompt.
        advantages = group_advantages(rewards, GROUP_SIZE)

        # 4. The teacher scores each token that the *student* wrote; it never generates.
        with torch.no_grad():
            teacher_logprobs = completion_logprobs(teacher, ids, attention_mask, mask)

        # 5. TRRD, and one optimiser step. The student has not moved since it sampled, so it is its
        # own old policy.
        student_logprobs = completion_logprobs(student, ids, attention_mask, mask)
        loss = trrd(
            student_logprobs,
            student_logprobs.detach(),
            teacher_logprobs,
            advantages,
            mask,
            alpha=options.alpha,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        length = mask.sum(dim=1).float().mean()
        print(
            f"step {step + 1:3}  correct {rewards.mean():6.1%}  tokens {length:5.1f}  loss "
            f"{loss.item():+.4f}",
            flush=True,
        )


def generate(
    student: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids of prompts and sampled completions [batch, all tokens], their attention mask, and
    the mask of completion tokens."""
    prompt = tokenizer(prompts, return_tensors="pt", padding=True)
    # top_k = 0 and top_p = 1: the tokens must come from the very distribution that is scored and
    # trained below.
    ids = student.generate(
        **prompt,
        max_new_tokens=MAX_COMPLETION_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
    )
    completion = ids[:, prompt["input_ids"].shape[1] :]
    # A completion ends with its first end token, which is trained on too; after it comes padding.
    is_end = completion == tokenizer.eos_token_id
    mask = is_end.cumsum(dim=1) - is_end.long() == 0
    return ids, torch.cat([prompt["attention_mask"], mask.long()], dim=1), mask


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Return (reward - mean of its group) / (standard deviation of its group + 1e-4), [batch]; 0 in
    a group of equal rewards."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, correction=0, keepdim=True) + 1e-4)).flatten()


def completion_logprobs(
    model: PreTrainedModel, ids: Tensor, attention_mask: Tensor, mask: Tensor
) -> Tensor:
    """Return the log-prob of each completion token given all tokens before it, [batch, token]."""
    # Padding on the left shifts nothing: positions count real tokens only.
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).logits
    # The logits at one token predict the next: the last ones predict nothing, and the first token
    # is never predicted.
    num_tokens = mask.shape[1]
    logprobs = logits[:, -num_tokens - 1 : -1].log_softmax(dim=-1)
    return logprobs.gather(2, ids[:, -num_tokens:, None]).squeeze(2)


def trrd(
    student_logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    alpha: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    teacher_log_ratio_clip: float = 1.0,
) -> Tensor:
    """Compute the loss of RLAD (arXiv 2602.22495, Eq. 3-5), a scalar. Log-probs and mask are
    [batch, token], advantages [batch]."""
    # The ratio of GRPO, with part of its denominator given to the teacher. The clamp keeps one
    # token on which teacher and student disagree wildly from dominating the step.
    to_teacher = (student_logprobs - teacher_logprobs).clamp(
        -teacher_log_ratio_clip, teacher_log_ratio_clip
    )
    log_ratio = alpha * (student_logprobs - old_logprobs) + (1 - alpha) * to_teacher
    # Values of padding must not reach exp, not even multiplied by 0: inf * 0 is NaN.
    ratio = torch.where(mask, log_ratio, 0).exp()
    # The minimum is what makes imitation selective: a right token that the teacher finds unlikely
    # (ratio above 1.28) is not reinforced, a wrong one that it likes (ratio below 0.8) is not
    # punished.
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    # Mean over the tokens of a completion, then over completions: a long one weighs no more than a
    # short one.
    per_completion = torch.where(mask, surrogate, 0).sum(dim=1) / mask.sum(dim=1)
    return -per_completion.mean()


if __name__ == "__main__":
    main()
