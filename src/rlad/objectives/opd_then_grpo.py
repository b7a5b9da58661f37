"""OPD, then GRPO: first imitate the teacher everywhere, then follow the reward alone (arXiv
2609.04108).

loss_t = OPD loss_t     in the first opd_share of the run's steps
loss_t = GRPO loss_t    in the others, with the same optimiser state
"""

import math
from typing import Literal


def phase_at(step: int, *, num_steps: int, opd_share: float) -> Literal["opd", "grpo"]:
    """The objective of the optimiser step with this number (from 0) in a run of `num_steps`."""
    # Rounded first: 0.07 * 100 is 7.000000000000001.
    return "opd" if step < math.ceil(round(opd_share * num_steps, 9)) else "grpo"
