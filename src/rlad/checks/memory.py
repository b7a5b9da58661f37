"""How much memory a run needs, from the models' files alone, and how much is free.

Imports torch only for what the files leave open: adapters, quantised layers, a GPU's memory.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import psutil

from rlad.config.run import RunConfig
from rlad.config.teacher import (
    AdapterTeacherConfig,
    EMATeacherConfig,
    LocalTeacherConfig,
    single_teachers,
)
from rlad.findings import Finding
from rlad.models.loading import load_model_config, pick_device
from rlad.models.sizes import num_adapter_parameters, num_parameters, quantized_bytes
from rlad.rollouts.growing_cache import room_for
from rlad.scoring.tiles import tile_shape, tokens_per_chunk

_GIB = 1024**3
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Student, old policy, sampler, teacher, reference: one float32 number a token each.
_NUM_LOGPROBS = 5


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the student's device; activations and logits are rules of thumb, the rest is
    counted."""

    student_weights: int
    gradients_and_optimizer: int
    teacher_weights: int
    reference_weights: int
    sampler_cache: int
    activations: int
    logits: int
    logprobs: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def models(self) -> int:
        """What no setting of the loop makes smaller."""
        return (
            self.student_weights
            + self.gradients_and_optimizer
            + self.teacher_weights
            + self.reference_weights
        )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device: what other programs leave now, and all of it."""

    free: int
    total: int


def estimate_memory(
    config: RunConfig, prompt_tokens: int, device: str | None = None
) -> MemoryEstimate:
    """On `device`, by default the student's. Weights that are trained are float32 (AdamW: 16 bytes
    a parameter for weight, gradient and two moments).

    Activations: about 34 bytes x hidden size a token and layer in 16 bit (arXiv 2205.05198, without
    the attention matrix), twice that in float32; with gradient checkpointing one layer's, plus the
    layer inputs. Logits: three times those of a tile, or those of the next token of all rows that
    are decoded at once and three times those of a chunk of rows; for `gkd` of a whole micro-batch,
    for student and teacher, with their log-probs. The sampler's cache: keys and values of whole
    sequences, with the room that it keeps for more tokens (`rlad.rollouts.growing_cache`: a
    quarter, at least 64).
    """
    rollout, loop, student = config.rollout, config.optimization, config.student
    shape, width = load_model_config(student.model).get_text_config(), _BYTES[student.dtype]
    num_trained = num_weights = num_parameters(student.model)
    if student.lora:
        num_trained = num_adapter_parameters(student.model, student.lora)
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    sequence, num_rollouts = (
        prompt_tokens + rollout.max_completion_tokens,
        rollout.prompts_per_batch * rollout.group_size,
    )
    tokens = min(loop.tokens_per_batch, num_rollouts * sequence)
    per_layer = 17 * width * hidden * tokens
    checkpointed = per_layer + width * hidden * layers * tokens
    device, teacher = (
        device or str(pick_device(student.device)),
        config.teacher if config.needs_teacher else None,
    )
    rows = min(rollout.max_batch_rows, num_rollouts)
    if config.objective.needs_vocabulary:
        logits = 4 * shape.vocab_size * tokens
    else:
        scored = [(shape, tokens), *_scored_by(teacher, shape, num_rollouts * sequence, device)]
        logits = max(
            _sampled_logits(shape, rows, device), *(_scored_logits(*one, device) for one in scored)
        )
    return MemoryEstimate(
        student_weights=4 * num_trained + (width * num_weights if student.lora else 0),
        gradients_and_optimizer=12 * num_trained,
        teacher_weights=teacher_bytes(teacher, num_trained, device),
        reference_weights=4 * num_weights if loop.kl_coef and not student.lora else 0,
        sampler_cache=rows * room_for(sequence) * 2 * layers * _key_size(shape) * width,
        activations=checkpointed if student.gradient_checkpointing else per_layer * layers,
        logits=4 * logits,
        logprobs=4 * _NUM_LOGPROBS * num_rollouts * rollout.max_completion_tokens,
    )


def teacher_bytes(teacher: Any, num_trained: int, device: str) -> int:
    """The weights that a teacher adds to the memory of the student's device."""
    num_bytes = 0
    for _, one in single_teachers(teacher):
        if isinstance(one, LocalTeacherConfig) and _is_on(one, device):
            num_bytes += _weights_bytes(one)
        elif isinstance(one, EMATeacherConfig) and one.update_rate != 1:
            num_bytes += 4 * num_trained
    return num_bytes  # what is served is elsewhere, and an adapter stands on the student's own base model


def _is_on(teacher: LocalTeacherConfig, device: str) -> bool:
    """`auto` is the student's device; `cuda` is the first GPU."""
    first = {"cuda": "cuda:0"}
    theirs = device if teacher.device == "auto" else str(pick_device(teacher.device))
    return first.get(theirs, theirs) == first.get(device, device)


def _type(device: str) -> str:
    """Without the number behind it."""
    return device.partition(":")[0]


def _weights_bytes(settings: LocalTeacherConfig) -> int:
    width = _BYTES[settings.dtype]
    if settings.quantization == "none":
        return width * num_parameters(settings.model)
    return quantized_bytes(settings.model, settings.quantization, width)


def _scored_by(
    teacher: Any, student: Any, num_tokens: int, device: str
) -> Iterator[tuple[Any, int]]:
    """The teachers on the student's device, each with the most tokens that it scores at once."""
    for _, one in single_teachers(teacher):
        if isinstance(one, LocalTeacherConfig) and _is_on(one, device):
            yield (
                load_model_config(one.model).get_text_config(),
                min(one.tokens_per_batch, num_tokens),
            )
        elif isinstance(one, AdapterTeacherConfig | EMATeacherConfig):
            yield student, min(one.tokens_per_batch, num_tokens)


def _scored_logits(shape: Any, tokens: int, device: str) -> int:
    """Numbers held at once while `tokens` are scored: a tile of logits, its float32 copy, and the
    log-probs or the gradient."""
    return 3 * prod(tile_shape(_type(device), tokens, shape.vocab_size))


def _sampled_logits(shape: Any, rows: int, device: str) -> int:
    """Numbers held at once while a token of each of `rows` is picked: logits, and of a chunk what
    is made of them."""
    return shape.vocab_size * (
        rows + 3 * min(rows, tokens_per_chunk(_type(device), shape.vocab_size))
    )


def memory_of(device: str) -> Memory:
    if _type(device) == "cuda":
        import torch

        return Memory(*torch.cuda.mem_get_info(device))
    memory = psutil.virtual_memory()
    return Memory(memory.available, memory.total)


def compare_memory(needed: MemoryEstimate, memory: Memory) -> Finding:
    """More than is free is doubtful; models that are larger than all of the memory cannot work."""
    parts = ", ".join(
        f"{name.replace('_', ' ')} {size / _GIB:.2f}"
        for name, size in asdict(needed).items()
        if size
    )
    message = (
        f"about {needed.total / _GIB:.2f} of {memory.free / _GIB:.1f} GiB that are free ({parts})"
    )
    if needed.models > memory.total:
        what = (
            f"weights and optimiser alone are more than the {memory.total / _GIB:.1f} GiB that "
            "there are; take a smaller "
            "model, [student.lora], teacher.quantization, or a served teacher."
        )
        return Finding("error", "memory", f"{message}; {what}")
    if needed.total <= memory.free:
        return Finding("ok", "memory", message)
    what = "lower optimization.tokens_per_batch or rollout.max_batch_rows, or set student.gradient_checkpointing = true"
    return Finding("warning", "memory", f"{message}; {what}")


def _key_size(shape: Any) -> int:
    """Numbers in the keys of one token and layer; 0 for models without attention."""
    heads = getattr(shape, "num_attention_heads", None)
    if not heads:
        return 0
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return (getattr(shape, "num_key_value_heads", None) or heads) * head_size
