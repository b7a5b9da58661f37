"""Sampled-token estimators of KL(πS || π*), per token (Schulman, joschu.net/blog/kl-approx.html).

d  = log π* - log πS
k2 = d^2 / 2       its gradient, on the student's own samples, is that of the reverse KL
k3 = e^d - d - 1   low variance and never negative; its gradient is that of the forward KL
"""

from torch import Tensor

from rlad.objectives.masks import LARGEST_LOG_RATIO


def kl_tokens(student_logprobs: Tensor, other_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Estimate the KL per token by `k2` or `k3`, with gradient to the student. Both log-probs must
    be finite and of one shape.

    Raises `ValueError` for other estimators, including `k1`: the gradient of -d is that of log πS,
    which does not depend on the other policy.
    """
    d = other_logprobs - student_logprobs
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        # Beyond the bound e^d continues along its tangent, so that value and gradient stay finite
        # and still point towards the teacher.
        bounded = d.clamp(max=LARGEST_LOG_RATIO)
        return bounded.exp() * (1 + (d - bounded)) - d - 1
    raise ValueError(
        f"KL estimator {estimator!r} is no loss (the gradient of 'k1' does not depend on the "
        "teacher); use 'k2' or 'k3'."
    )
