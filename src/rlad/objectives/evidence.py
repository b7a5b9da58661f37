"""Bounded weights of an advantage, from a contrast of log-probs: the path of `rlsd` and `srpo`.

r_t = exp( clamp( sign(Â) δ_t, least, most ) )        (constant)

δ_t > 0 says that what was shown speaks for the token. r is positive, so it changes how much a token
counts and never the sign of its advantage.
"""

from torch import Tensor


def evidence_ratio(
    advantages: Tensor, contrast: Tensor, *, least: float | None = None, most: float
) -> Tensor:
    """Compute r of each token; both tensors [batch, token], the contrast without gradient.

    Bounded before exp, so that it never overflows.
    """
    return (advantages.sign() * contrast).clamp(min=least, max=most).exp()
