"""A plan on paper: memory of each GPU and seconds of each part of a step, with the teacher in each
place that it could have.

    python benchmarks/scaling_plan.py                           the two plans of docs/scaling.md
    python benchmarks/scaling_plan.py --step-json step.json     with the teacher share that `benchmarks/step.py --json` measured
    python benchmarks/scaling_plan.py --chip A100 --tokens 8192 --matrix-share 0.5

Nothing here is measured. Bytes are `rlad check`'s estimate (`rlad.checks.memory`) of the models'
shapes, spread over the GPUs as the formulas below say; FLOPs and bytes of a step are those of
`benchmarks/gpu.py`. Seconds are FLOPs / (peak x matrix share) and bytes / (bandwidth x bandwidth
share); both shares are assumptions, and `benchmarks/gpu.py` measures them on a chip.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from gpu import CHIPS, SHAPES, Shape, block_weights, forward_flops
from transformers import CONFIG_MAPPING

from rlad.checks.memory import MemoryEstimate, estimate_memory
from rlad.config.file import parse_config
from rlad.rollouts.growing_cache import room_for

MODELS = SHAPES | {"Qwen3-32B": Shape(5120, 25_600, 64, 64, 8, tied=False)}
GB = 1e9
USABLE = 0.9
"""Of a GPU's memory; the rest is the allocator's, NCCL's and CUDA's own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A student and a teacher on GPUs of one size."""

    student: str
    teacher: str
    gpus: int
    is_sharded: bool
    """the student over all GPUs that train it, else whole on each"""
    rollout_shards: int
    """GPUs that share one copy of the student in vLLM (tensor parallel)"""
    served_on: int
    """GPUs that a served teacher takes from all"""


PLANS = (
    Plan("Qwen3-0.6B", "Qwen3-8B", gpus=8, is_sharded=False, rollout_shards=1, served_on=2),
    Plan("Qwen3-8B", "Qwen3-32B", gpus=64, is_sharded=True, rollout_shards=2, served_on=16),
)
PLACES = ("replicated", "sharded", "served")


# --- memory -----------------------------------------------------------------------------------------------------------


def estimate(plan: Plan, rollouts: int, options: Any) -> MemoryEstimate:
    """`rlad check`'s, as if one GPU held all of student and teacher and `rollouts` of a rollout
    batch."""
    with TemporaryDirectory() as folder:
        names = {
            part: _written(MODELS[getattr(plan, part)], Path(folder) / part)
            for part in ("student", "teacher")
        }
        config = {
            "student": {
                "model": names["student"],
                "dtype": "bfloat16",
                "gradient_checkpointing": True,
            },
            "teacher": {"model": names["teacher"], "dtype": "bfloat16"},
            "task": {"type": "knights_and_knaves"},
            "rollout": {
                "prompts_per_batch": 1,
                "group_size": rollouts,
                "max_completion_tokens": options.tokens,
                "max_batch_rows": options.rows_decoded,
            },
            "optimization": {"tokens_per_batch": options.tokens_per_batch},
        }
        return estimate_memory(parse_config(config), options.prompt_tokens, device="cuda")


def _written(shape: Shape, folder: Path) -> str:
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
    }
    config: Any = CONFIG_MAPPING["qwen3"]
    config(**sizes, head_dim=shape.head_dim, tie_word_embeddings=shape.tied).save_pretrained(folder)
    return str(folder)


def gathered_weights(shape: Shape) -> float:
    """What sharding holds whole at a time: two layers, and embeddings and head, which belong to no
    layer."""
    return 2 * block_weights(shape) / shape.layers + num_weights(shape) - block_weights(shape)


def memory(plan: Plan, place: str, options: Any) -> dict[str, float]:
    """Bytes on each GPU that trains, by what they are for."""
    trains, longest = _training_gpus(plan, place), options.prompt_tokens + options.tokens
    whole, shards = (
        estimate(plan, -(-options.rollouts // trains), options),
        trains if plan.is_sharded else 1,
    )
    teacher = {"replicated": 1.0, "sharded": 1 / trains, "served": 0.0}[place]
    gathered = {name: gathered_weights(MODELS[name]) for name in (plan.student, plan.teacher)}
    return {
        "student": whole.student_weights / shards,
        "gradient, Adam": whole.gradients_and_optimizer / shards,
        # bfloat16 weights, their gradient, and its float32 copy that is summed over GPUs; of the
        # teacher the weights.
        "gathered": (8 * gathered[plan.student] if plan.is_sharded else 0)
        + (2 * gathered[plan.teacher] if place == "sharded" else 0),
        "teacher": whole.teacher_weights * teacher,
        "vLLM copy": whole.student_weights / 2 / plan.rollout_shards,
        # vLLM pages its cache: none of the room that our sampler keeps.
        "KV cache": whole.sampler_cache * longest / room_for(longest),
        "activations": float(whole.activations),
        "log-probs": float(whole.logits + whole.logprobs),
    }


def _training_gpus(plan: Plan, place: str) -> int:
    return plan.gpus - (plan.served_on if place == "served" else 0)


# --- time -------------------------------------------------------------------------------------------------------------


def flops_of(plan: Plan, options: Any) -> dict[str, float]:
    """Of a whole step on all GPUs; the teacher is not asked about completions of advantage 0."""
    student, teacher, rows = MODELS[plan.student], MODELS[plan.teacher], options.rollouts
    mean = round(options.tokens * options.mean_share)
    layers, head = forward_flops(student, rows, options.prompt_tokens, mean)
    asked = round(rows * (1 - options.zero_variance))
    return {
        "generation": layers + head,
        "teacher": sum(forward_flops(teacher, asked, options.prompt_tokens, mean)),
        # Backward is twice the forward pass; checkpointing makes the layers' once more, the
        # log-probs in tiles the head's.
        "update": 4 * layers + 4 * head,
    }


def bytes_decoded(plan: Plan, trains: int, options: Any) -> float:
    """Read by one GPU: for the rows that are decoded at once the student, once for each token of
    the longest completion; keys and values once for each token.
    """
    student, mean = MODELS[plan.student], options.tokens * options.mean_share
    key_bytes = 2 * 2 * student.layers * student.key_value_heads * student.head_dim
    rows = options.rollouts / trains
    cache = rows * mean * (options.prompt_tokens + mean / 2) * key_bytes
    passes = math.ceil(rows / options.rows_decoded) * options.tokens
    return cache + passes * 2 * num_weights(student) / plan.rollout_shards


def seconds(plan: Plan, place: str, options: Any) -> dict[str, float]:
    """Of each part of a step, one after the other.

    What is sharded is gathered once in each forward pass of a micro-batch; in the update once more,
    and the gradient, in float32, goes the other way: 2 + 2 + 4 bytes a weight. That goes on while
    the GPU computes, so the greater counts.
    """
    peak, bandwidth = CHIPS[options.chip]
    flops, num_bytes = peak * options.matrix_share, bandwidth * options.bandwidth_share
    trains, parts = _training_gpus(plan, place), flops_of(plan, options)
    student, teacher = (2 * num_weights(MODELS[name]) for name in (plan.student, plan.teacher))
    length = options.prompt_tokens + options.tokens * options.mean_share
    gathering = -(-options.rollouts * length // (trains * options.tokens_per_batch)) / (
        options.link_gigabytes * GB
    )
    return {
        "generation": max(
            parts["generation"] / trains / flops, bytes_decoded(plan, trains, options) / num_bytes
        ),
        "teacher": max(
            parts["teacher"] / (plan.served_on if place == "served" else trains) / flops,
            gathering * teacher if place == "sharded" else 0.0,
        ),
        "update": max(
            parts["update"] / trains / flops, gathering * 4 * student if plan.is_sharded else 0.0
        ),
    }


def num_weights(shape: Shape) -> int:
    return block_weights(shape) + shape.hidden * shape.vocabulary * (1 if shape.tied else 2)


def teacher_ratio(plan: Plan, options: Any) -> float:
    """Forward FLOPs of the teacher / those of the student, on the same tokens."""
    mean = round(options.tokens * options.mean_share)
    each = [
        sum(forward_flops(MODELS[name], 1, options.prompt_tokens, mean))
        for name in (plan.teacher, plan.student)
    ]
    return each[0] / each[1]


def scaled_share(measured: float, ratio: float) -> float:
    """Teacher share s of a step when the teacher costs `ratio` times as much: s k / (1 - s + s
    k)."""
    return measured * ratio / (1 - measured + measured * ratio)


def measured_shares(file: Path) -> Iterator[tuple[str, float]]:
    """Of the cases of `benchmarks/step.py --json` whose teacher has the student's size: the
    teacher's part of rlad's step."""
    for one in json.loads(file.read_text())["cases"]:
        case, steps = one["case"], one["rounds"]["rlad trrd"]
        if (case["teacher_hidden"], case["teacher_layers"]) == (case["hidden"], case["layers"]):
            title = f"{case['lengths']}, zero-variance share {case['zero_variance']}, vocabulary {case['vocabulary']}"
            yield title, median(step["teacher"] / step["total"] for step in steps)


# --- tables -----------------------------------------------------------------------------------------------------------


def show(plan: Plan, options: Any) -> dict[str, Any]:
    of_chip = USABLE * options.gpu_gigabytes
    print(
        f"## {plan.student} <- {plan.teacher} on {plan.gpus} {options.chip} of "
        f"{options.gpu_gigabytes:.0f} GB\n"
    )
    where = "sharded over all GPUs that train it" if plan.is_sharded else "whole on each GPU"
    print(
        f"Student {where}, its copy in vLLM over {plan.rollout_shards}; a served teacher takes "
        f"{plan.served_on} GPUs.\n"
    )
    result: dict[str, Any] = {"plan": asdict(plan), "memory": {}, "seconds": {}}
    for place in PLACES:
        result["memory"][place], result["seconds"][place] = (
            memory(plan, place, options),
            seconds(plan, place, options),
        )
    print(f"| GB on a GPU, teacher | {' | '.join(result['memory'][PLACES[0]])} | sum | fits |")
    print(f"| --- |{' ---: |' * (len(result['memory'][PLACES[0]]) + 1)} --- |")
    for place, parts in result["memory"].items():
        total = sum(parts.values()) / GB
        cells = " | ".join(f"{size / GB:.1f}" for size in parts.values())
        print(f"| {place} | {cells} | {total:.1f} | {'yes' if total <= of_chip else 'no'} |")
    print(
        "\nPFLOP of a step: "
        + ", ".join(f"{what} {n / 1e15:.1f}" for what, n in flops_of(plan, options).items())
        + "\n"
    )
    print(
        "| seconds, teacher | generation | teacher | update | step | teacher share |\n| --- |"
        + " ---: |" * 5
    )
    for place, parts in result["seconds"].items():
        total = sum(parts.values())
        cells = " | ".join(f"{part:.2f}" for part in parts.values())
        print(f"| {place} | {cells} | {total:.2f} | {parts['teacher'] / total:.0%} |")
    ratio = teacher_ratio(plan, options)
    print(f"\nTeacher / student, forward FLOPs on the same tokens: {ratio:.1f}")
    for title, share in measured_shares(options.step_json) if options.step_json else ():
        print(
            f"Measured {share:.1%} with one of the student's size ({title}), so with this one "
            f"{scaled_share(share, ratio):.0%}"
        )
    print()
    return result


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=list(CHIPS), default="H100")
    parser.add_argument("--gpu-gigabytes", type=float, default=80.0)
    parser.add_argument(
        "--rollouts",
        type=int,
        default=1024,
        help="of a rollout batch, on all GPUs; one optimiser step",
    )
    parser.add_argument(
        "--rows-decoded", type=int, default=32, help="completions that a GPU decodes at once"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="most of a completion")
    parser.add_argument(
        "--mean-share", type=float, default=0.4, help="mean length of completions / --tokens"
    )
    parser.add_argument(
        "--tokens-per-batch", type=int, default=16_384, help="of one forward and backward pass"
    )
    parser.add_argument(
        "--zero-variance", type=float, default=0.3, help="share of completions with advantage 0"
    )
    parser.add_argument(
        "--matrix-share",
        type=float,
        default=0.4,
        help="of the matrix peak that scoring and update reach",
    )
    parser.add_argument(
        "--bandwidth-share",
        type=float,
        default=0.5,
        help="of the memory bandwidth that decoding reaches",
    )
    parser.add_argument(
        "--link-gigabytes",
        type=float,
        default=50.0,
        help="a second, between GPUs of different hosts",
    )
    parser.add_argument("--step-json", type=Path, help="what `benchmarks/step.py --json` wrote")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    results = [show(plan, options) for plan in PLANS]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
