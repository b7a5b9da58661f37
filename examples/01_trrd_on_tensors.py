"""TRRD on plain tensors: what the teacher does to each token of two completions.

Run it with `python examples/01_trrd_on_tensors.py`; it needs no model and takes a second.
"""

from typing import Any

import torch

from rlad import aggregate, group_advantages, grpo_loss, trrd_loss

# Two completions of one prompt, the first was judged correct. The second one is a token shorter:
# its last entry is padding.
words = [["so", "Ada", "is", "a knight"], ["so", "Ada", "lies", "(padding)"]]
mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
advantages = group_advantages(torch.tensor([1.0, 0.0]), group_size=2)  # +1 and -1

# The probability that the student gave to each token it sampled, and what the teacher thinks of the
# same tokens.
student = torch.tensor([[0.50, 0.30, 0.60, 0.20], [0.40, 0.30, 0.25, 1.0]])
teacher = torch.tensor([[0.55, 0.10, 0.80, 0.90], [0.90, 0.25, 0.02, 1.0]])
tensors: dict[str, Any] = {
    "student_logprobs": student.log().requires_grad_(),
    "old_logprobs": student.log(),  # first optimiser step: the student has not moved yet
    "advantages": advantages,
    "mask": mask,
}

token_loss, stats = trrd_loss(**tensors, teacher_logprobs=teacher.log(), alpha=0.5)
loss = aggregate(token_loss, mask, mode="sequence_mean")
# How hard each token is pushed: minus the gradient of its loss. Above 0 it becomes more likely, at
# 0 it is left alone.
(gradient,) = torch.autograd.grad(token_loss.sum(), tensors["student_logprobs"])
push = 0 - gradient

print("token       advantage  student  teacher  ratio   push  what happens")
for i, j in mask.nonzero().tolist():
    if stats["gated_positive"][i, j]:
        fate = "held back: right answer, but the teacher finds the token unlikely"
    elif stats["gated_negative"][i, j]:
        fate = "protected: wrong answer, but the teacher likes the token"
    else:
        fate = "reinforced" if advantages[i] > 0 else "punished"
    if stats["clamped"][i, j] and push[i, j] != 0:
        fate += " (clamped: the push is only alpha times the ratio)"
    print(
        f"{words[i][j]:11} {advantages[i]:+9.2f} {student[i, j]:8.2f} {teacher[i, j]:8.2f}"
        f" {stats['ratio'][i, j]:6.3f} {push[i, j]:+6.2f}  {fate}"
    )
print(
    f"\nloss of the batch: {loss.item():+.4f} (mean over completions of the mean over their tokens)"
)

# alpha = 1 leaves no teacher in the ratio: it is GRPO, in value and gradient.
alone, _ = trrd_loss(**tensors, teacher_logprobs=teacher.log(), alpha=1.0)
grpo, _ = grpo_loss(**tensors)
(alone_gradient,) = torch.autograd.grad(alone.sum(), tensors["student_logprobs"])
(grpo_gradient,) = torch.autograd.grad(grpo.sum(), tensors["student_logprobs"])
print(
    f"alpha = 1 against GRPO: losses differ by {(alone - grpo).abs().max().item():.1g},"
    f" gradients by {(alone_gradient - grpo_gradient).abs().max().item():.1g}"
)
