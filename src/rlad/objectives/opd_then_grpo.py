"""OPD, then GRPO: first imitate the teacher, then use only the reward (arXiv 2609.04108).

loss_t = OPD loss_t     in the first opd_share of the run's steps
loss_t = GRPO loss_t    in the others, with the same optimiser state
"""
