"""Teacher scoring, update and decoding (also by CUDA graphs, and by vLLM where it is installed) on
one GPU, beside the floor that the chip sets; random weights of real shapes.

    python benchmarks/gpu.py --json gpu.json      a few minutes on a GPU with 80 GB or more
    python benchmarks/gpu.py --smoke              the same code with tiny shapes on the CPU

Students Qwen3-0.6B and 1.7B (float32 weights, bfloat16 forward pass), teacher Qwen3-8B (bfloat16),
built from their configs on the device. The floor of a piece of work is the greater of FLOPs /
matrix peak and bytes / memory bandwidth. FLOPs: 2 for each weight and token forward, 4 backward,
attention over half of the square, the head for completion tokens alone (forward once more in its
backward pass). Bytes: the weights once for each micro-batch or decoding step, the keys and values
once for each decoding step, and for the update the gradient and both moments of Adam as they are
read and written. Peak and bandwidth are the maker's where the chip is known (dense bfloat16), else
measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import batch_of
from replay import EOS, PAD, Case, ReplayTask, word_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rlad.config.run import RunConfig
from rlad.engines.native.loop import NativeEngine
from rlad.models.loading import LanguageModel
from rlad.rollouts.decoding_steps import GraphSteps
from rlad.rollouts.samplers import make_sampler, obstacle_to_vllm
from rlad.rollouts.sampling import sample
from rlad.rollouts.types import Completion
from rlad.teachers.local import LocalTeacher

CHIPS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40": (181e12, 0.86e12),
}
"""dense bfloat16 FLOP/s and bytes/s, by a part of the name"""


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int = 128
    vocabulary: int = 151_936
    tied: bool = True


SHAPES = {
    "Qwen3-0.6B": Shape(1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": Shape(2048, 6144, 28, 16, 8),
    "Qwen3-8B": Shape(4096, 12_288, 36, 32, 8, tied=False),
}
SMOKE = Shape(32, 64, 2, 2, 1, head_dim=32, vocabulary=200)
STUDENTS = ("Qwen3-0.6B", "Qwen3-1.7B")
TEACHER = "Qwen3-8B"


@dataclass(frozen=True, slots=True)
class Work:
    """How many tokens a piece of work is about, and what it cannot do without."""

    tokens: int
    flops: float
    num_bytes: float


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    config_of: Any = CONFIG_MAPPING["qwen3"]
    config = config_of(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40_960,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return LanguageModel("random", model, word_tokenizer(200), (EOS,), PAD, torch.bfloat16)


def block_weights(shape: Shape) -> int:
    """Weights of all layers' matrices."""
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.key_value_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.intermediate)


def forward_flops(shape: Shape, rows: int, prompt: int, completion: int) -> tuple[float, float]:
    """FLOPs of the layers and of the head."""
    length = prompt + completion
    attention = 4 * shape.layers * shape.heads * shape.head_dim * length * length / 2
    layers = rows * (2 * block_weights(shape) * length + attention)
    return layers, rows * completion * 2.0 * shape.hidden * shape.vocabulary


def scoring(shape: Shape, case: Case, tokens: int) -> Work:
    layers, head = forward_flops(shape, case.num_rows, case.prompt_tokens, tokens)
    weights = block_weights(shape) + shape.hidden * shape.vocabulary
    return Work(case.num_rows * tokens, layers + head, 2 * weights * _micro_batches(case, tokens))


def updating(shape: Shape, case: Case, tokens: int) -> Work:
    layers, head = forward_flops(shape, case.num_rows, case.prompt_tokens, tokens)
    weights = block_weights(shape) + shape.hidden * shape.vocabulary
    # Forward and backward read them; Adam reads weight, gradient and moments and writes weight and
    # moments, 4 bytes each.
    num_bytes = 4 * weights * (2 * _micro_batches(case, tokens) + 7)
    return Work(case.num_rows * tokens, 3 * layers + 4 * head, num_bytes)


def decoding(shape: Shape, case: Case, tokens: int) -> Work:
    layers, head = forward_flops(shape, case.num_rows, 0, tokens)
    weights = 4 * (block_weights(shape) + shape.hidden * shape.vocabulary)
    cache = (
        2
        * 2
        * shape.layers
        * shape.key_value_heads
        * shape.head_dim
        * (case.prompt_tokens + tokens / 2)
        * case.num_rows
    )
    return Work(case.num_rows * tokens, layers + head, tokens * (weights + cache))


def _micro_batches(case: Case, tokens: int) -> int:
    return -(-case.num_rows // max(1, case.tokens_per_batch // (case.prompt_tokens + tokens)))


def seconds(work: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Median, after one that is not counted."""
    times = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def chip(device: torch.device, size: int) -> tuple[str, float, float]:
    """Name, FLOP/s and bytes/s."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for part, (flops, bandwidth) in CHIPS.items():
        if part in name:
            return name, flops, bandwidth
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = seconds(lambda: square @ square, device, 5)
    copy = seconds(lambda: square.clone(), device, 5)
    return f"{name} (measured)", 2 * size**3 / product, 2 * 2 * size**2 / copy


def engine_of(
    case: Case, student: LanguageModel, teacher: LanguageModel, steps: int
) -> NativeEngine:
    config = RunConfig.model_validate(
        {
            "student": {"model": "random", "dtype": "bfloat16"},
            "teacher": {"model": "random"},
            "task": {"type": "knights_and_knaves"},  # of which `ReplayTask` takes the place
            "rollout": {"prompts_per_batch": case.num_prompts, "group_size": case.group_size},
            "optimization": {"num_steps": steps, "tokens_per_batch": case.tokens_per_batch},
        }
    )
    scores = LocalTeacher(teacher, temperature=1.0, tokens_per_batch=case.tokens_per_batch)
    return NativeEngine(config, student=student, task=ReplayTask(case), teacher=scores)


def measure(
    name: str, shapes: dict[str, Shape], case: Case, teacher: LanguageModel, options: Any
) -> dict[str, Any]:
    """Work and seconds of teacher scoring, update and decoding with one student."""
    device = teacher.model.device
    student = build(shapes[name], device, torch.float32)
    engine = engine_of(case, student, teacher, options.repetitions + 1)
    batch = batch_of(engine, case, case.max_tokens)

    def score() -> None:
        batch.teacher_logprobs = batch.by_rollout(engine._ask_teacher(batch), batch.teacher_rows)

    prompts = [group.prompt_token_ids for group in batch.groups]
    limits: dict[str, Any] = {
        "group_size": case.group_size,
        "max_completion_tokens": options.decoded,
        "temperature": 1.0,
        "seed": 0,
    }
    decode = partial(sample, student, prompts, **limits)
    decode_by_graphs = partial(decode, make_steps=GraphSteps)
    agreement(decode(), decode_by_graphs())

    def update() -> None:
        engine.update(batch, range(case.num_prompts))

    pieces = {
        f"{TEACHER} scores": (score, scoring(shapes[TEACHER], case, case.max_tokens)),
        f"{name} update": (update, updating(shapes[name], case, case.max_tokens)),
        f"{name} decodes": (decode, decoding(shapes[name], case, options.decoded)),
        f"{name} decodes, CUDA graphs": (
            decode_by_graphs,
            decoding(shapes[name], case, options.decoded),
        ),
    }
    measured = {
        what: (piece, seconds(do, device, options.repetitions))
        for what, (do, piece) in pieces.items()
    }
    if obstacle := obstacle_to_vllm(student):
        print(f"no vLLM: {obstacle}", file=sys.stderr)
        return measured
    rollout = engine.config.rollout.model_copy(
        update={
            "engine": "vllm",
            "max_prompt_tokens": case.prompt_tokens,
            "max_completion_tokens": options.decoded,
            "max_batch_rows": case.num_rows,
        }
    )
    with closing(make_sampler(student, rollout)) as vllm:
        write = partial(vllm.sample, prompts, **limits)
        took = seconds(write, device, options.repetitions)
        measured[f"{name} decodes, vLLM"] = (decoding(shapes[name], case, options.decoded), took)

        def hand_over() -> None:
            vllm.weights_changed()
            vllm.update_weights()

        # Float32 is read, bfloat16 written.
        weights = block_weights(shapes[name]) + shapes[name].hidden * shapes[name].vocabulary
        work = Work(case.num_rows * options.decoded, 0.0, 6 * weights)
        measured[f"{name} weights to vLLM"] = (work, seconds(hand_over, device, 1))
    return measured


def agreement(plain: list[list[Completion]], graphs: list[list[Completion]]) -> None:
    """Print how alike the completions of plain decoding and of CUDA graphs are: by rounding a row
    may take another token, after which it is another completion."""
    pairs = [
        (one, other)
        for group, others in zip(plain, graphs, strict=True)
        for one, other in zip(group, others, strict=True)
    ]
    num_equal = sum(one.token_ids == other.token_ids for one, other in pairs)
    firsts = [abs(one.logprobs[0] - other.logprobs[0]) for one, other in pairs]
    print(
        f"CUDA graphs: {num_equal} of {len(pairs)} completions equal those of plain decoding, "
        f"first log-probs differ by at most {max(firsts):.1e}",
        file=sys.stderr,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of each completion")
    parser.add_argument(
        "--decoded", type=int, default=64, help="tokens of each completion that is decoded"
    )
    parser.add_argument("--tokens-per-batch", type=int, default=8192)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument(
        "--max-seconds", type=float, default=420, help="begin no other student after so long"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        sys.exit(
            "gpu.py needs a CUDA GPU and torch built for it; --smoke runs its code with tiny "
            "shapes on the CPU."
        )
    started = time.perf_counter()
    device = torch.device("cpu" if options.smoke else "cuda")
    shapes = dict.fromkeys(SHAPES, SMOKE) if options.smoke else SHAPES
    case = Case(
        200,
        options.tokens,
        "equal",
        num_prompts=options.prompts,
        group_size=options.group_size,
        prompt_tokens=256,
    )
    case = replace(case, tokens_per_batch=options.tokens_per_batch)
    if options.smoke:
        options.decoded = 4
        case = replace(
            case, max_tokens=16, prompt_tokens=8, num_prompts=2, group_size=4, tokens_per_batch=64
        )
    name, flops, bandwidth = chip(device, 256 if options.smoke else 8192)
    print(
        f"{name}: {flops / 1e12:.3g} TFLOP/s bfloat16, {bandwidth / 1e12:.3g} TB/s; {case.title}\n"
    )
    print("| work | tokens/s | s | floor s | s / floor | share of matrix peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    teacher = build(shapes[TEACHER], device, torch.bfloat16)
    results = {"chip": [name, flops, bandwidth], "rows": {}}
    for student in STUDENTS:
        if time.perf_counter() - started > options.max_seconds:
            print(f"{student} left out: {options.max_seconds:.0f} s are over")
            continue
        for what, (work, took) in measure(student, shapes, case, teacher, options).items():
            floor = max(work.flops / flops, work.num_bytes / bandwidth)
            share = work.flops / took / flops
            results["rows"][f"{student}: {what}"] = {
                "seconds": took,
                "floor": floor,
                "tokens": work.tokens,
                "share": share,
            }
            speed = f"{work.tokens / took:.0f} | {took:.3f} | {floor:.3f} | {took / floor:.1f}"
            print(f"| {what} | {speed} | {share:.1%} |", flush=True)
    if device.type == "cuda":
        results["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        print(f"\npeak memory {results['peak_bytes'] / 1e9:.1f} GB")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
