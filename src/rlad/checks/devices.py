"""Memory and speed of GPUs by their data sheets, and what a run would take of them.

Nothing here was measured: the seconds are arithmetic on data sheets, with the shares of their
figures that such loops usually reach.
"""

from dataclasses import dataclass

from rlad.config.run import RunConfig
from rlad.models.known import KnownModel

REACHED_COMPUTE = 0.35
"""of the data sheet's FLOP/s, in scoring and updates"""
REACHED_BANDWIDTH = 0.5
"""of the data sheet's bytes/s, in decoding"""
SECONDS_PER_LAYER = 1e-3
"""least time of a decoding step, for each layer: our own decoder starts its kernels one by one"""
SECONDS_PER_LAYER_VLLM = 5e-5
MEAN_LENGTH = 0.5
"""of a completion, as a share of the longest"""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its data sheet: memory in GiB, dense bfloat16 TFLOP/s, GB/s of its memory."""

    title: str
    memory: float
    teraflops: float
    gigabytes_per_second: float


DEVICES = {
    "rtx3090": Device("RTX 3090", 24, 71, 936),
    "rtx4090": Device("RTX 4090", 24, 165, 1008),
    "rtx5090": Device("RTX 5090", 32, 210, 1792),
    "l4": Device("L4", 24, 121, 300),
    "a10g": Device("A10G", 24, 70, 600),
    "l40s": Device("L40S", 48, 362, 864),
    "a100-40": Device("A100 40 GB", 40, 312, 1555),
    "a100": Device("A100 80 GB", 80, 312, 2039),
    "h100": Device("H100 80 GB", 80, 989, 3350),
    "h200": Device("H200", 141, 989, 4800),
    "b200": Device("B200", 180, 2250, 8000),
}


def estimate_hours(
    config: RunConfig,
    device: Device,
    student: tuple[KnownModel, int],
    teacher: tuple[KnownModel, int],
    prompt_tokens: int,
    *,
    with_vllm: bool,
) -> float:
    """Estimate the hours of a run, each model with the number of its weights.

    A decoding step reads the weights and the cache; a scored token costs 2 FLOP a weight, a trained
    one 6, with gradient checkpointing 8. A round of decoding lasts until its longest completion.
    """
    rollout = config.rollout
    shape, num_weights = student
    rounds = -(-rollout.prompts_per_batch * rollout.group_size // rollout.max_batch_rows)
    mean_tokens = rollout.max_completion_tokens * MEAN_LENGTH
    rows = rollout.max_batch_rows * MEAN_LENGTH  # finished ones leave
    cache = rows * (prompt_tokens + mean_tokens / 2) * 4 * shape.layers * shape.key_size
    # float32 weights are read and written as bfloat16 by our decoder, those of vLLM are bfloat16.
    weights = num_weights * (2 if with_vllm or config.student.lora else 4)
    bandwidth = device.gigabytes_per_second * 1e9 * REACHED_BANDWIDTH
    least = shape.layers * (SECONDS_PER_LAYER_VLLM if with_vllm else SECONDS_PER_LAYER)
    decoding_step = max((weights + cache) / bandwidth, least)

    def generation(num_rows: int) -> float:
        num_rounds = max(1, num_rows / rollout.max_batch_rows)
        return num_rounds * rollout.max_completion_tokens * decoding_step

    num_rollouts = rollout.prompts_per_batch * rollout.group_size
    tokens = num_rollouts * (prompt_tokens + mean_tokens)
    per_weight = 8 if config.student.gradient_checkpointing else 6
    flop = tokens * (per_weight * num_weights + 2 * teacher[1])
    step = generation(rounds * rollout.max_batch_rows)
    step += flop / (device.teraflops * 1e12 * REACHED_COMPUTE)
    evaluation = config.evaluation
    num_validations = config.optimization.num_steps // evaluation.every_steps
    evaluations = num_validations * generation(evaluation.num_validation_problems)
    evaluations += 2 * generation(evaluation.num_test_problems)
    return (config.optimization.num_steps * step + evaluations) / 3600
