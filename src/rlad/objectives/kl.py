"""Sampled-token estimators of KL(πS || π*), per token, with d = log π* - log πS (Schulman,
joschu.net/blog/kl-approx.html).

k2 = d^2 / 2          its gradient, on the student's own samples, is that of the reverse KL (2506.02208)
k3 = e^d - d - 1      low variance and never negative; its gradient is that of the forward KL
"""

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k2", "k3"]


def kl_tokens(
    student_logprobs: Tensor, other_logprobs: Tensor, *, estimator: KLEstimator
) -> Tensor:
    """The estimate per token, of the shape of the arguments, with gradient to the student. Finite
    inputs expected.

    Raises `ValueError` for `k1`: -d has the gradient of log πS, in which the other policy does not
    occur.
    """
    d = other_logprobs - student_logprobs
    match estimator:
        case "k2":
            return d.square() / 2
        case "k3":
            return d.exp() - d - 1
        case "k1":
            raise ValueError(
                "KL estimator 'k1' is refused as a loss: its gradient does not depend on the "
                "teacher; use 'k2' or 'k3'."
            )
        case _:
            raise ValueError(f"KL estimator {estimator!r} is unknown; use 'k2' or 'k3'.")
