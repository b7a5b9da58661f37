"""Memory and speed of GPUs from their data sheets, and estimates of a run's time.

Nothing here was measured: the seconds are computed from data sheets, with the shares of their
figures that such loops usually reach.
"""

from dataclasses import dataclass

from rlad.config.run import RunConfig
from rlad.models.known import KnownModel

REACHED_COMPUTE = 0.35
"""Share of the data sheet's FLOP/s that scoring and updates reach."""
REACHED_BANDWIDTH = 0.5
"""Share of the data sheet's bytes/s that decoding reaches."""
SECONDS_PER_LAYER = 1e-3
"""Shortest time of a decoding step per layer: our own decoder launches its kernels one by one."""
SECONDS_PER_LAYER_VLLM = 5e-5
MEAN_LENGTH = 0.5
"""Mean length of a completion, as a share of the longest."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU's data sheet: memory in GiB, dense bfloat16 TFLOP/s, memory bandwidth in GB/s."""

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
    """Estimate the hours of a run from the number of weights of each model.

    A decoding step reads the weights and the cache. A scored token costs 2 FLOP per weight, a
    trained token 6, or 8 with gradient checkpointing. A round of decoding ends with its longest
    completion.
    """
    rollout = config.rollout
    shape, num_weights = student
    rounds = -(-rollout.prompts_per_batch * rollout.group_size // rollout.max_batch_rows)
    mean_tokens = rollout.max_completion_tokens * MEAN_LENGTH
    rows = rollout.max_batch_rows * MEAN_LENGTH  # finished ones leave
    cache = rows * (prompt_tokens + mean_tokens / 2) * 4 * shape.layers * shape.key_size
    # Our decoder reads float32 weights and writes them as bfloat16; vLLM's weights are bfloat16.
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
