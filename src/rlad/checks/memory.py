"""Estimate how much memory a run needs, from the models' configs only, and how much is free."""

from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from rlad.config.run import RunConfig
from rlad.config.teacher import EMATeacherConfig, LocalTeacherConfig, single_teachers
from rlad.findings import Finding
from rlad.models.loading import pick_device
from rlad.models.sizes import num_adapter_parameters, num_parameters, quantized_bytes
from rlad.models.without_weights import load_model_config
from rlad.rollouts.growing_cache import room_for
from rlad.scoring.tiles import LOGITS_PER_TILE, tokens_per_chunk

_GIB = 1024**3
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """The bytes needed on the student's device. Activations and logits are rules of thumb; the rest
    is counted."""

    student_weights: int
    gradients_and_optimizer: int
    teacher_weights: int
    reference_weights: int
    sampler_cache: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def models(self) -> int:
        """The bytes that no setting of the loop can reduce."""
        weights = self.student_weights + self.teacher_weights + self.reference_weights
        return weights + self.gradients_and_optimizer


def estimate_memory(
    config: RunConfig, prompt_tokens: int, device: str | None = None
) -> MemoryEstimate:
    """Estimate the bytes on `device`, by default the student's.

    Trained weights are float32 (AdamW: 16 bytes per parameter for weight, gradient and two
    moments). Activations: about 34 bytes x hidden size per token and layer in 16 bit (arXiv
    2205.05198, without the attention matrix), twice that in float32; with gradient checkpointing
    those of one layer, plus the layer inputs. The sampler's cache: keys and values of whole
    sequences, with its room for more tokens (`rlad.rollouts.growing_cache`).
    """
    rollout = config.rollout
    loop = config.optimization
    student = config.student
    device = device or str(pick_device(student.device))
    teacher = config.teacher if config.needs_teacher else None
    shape = load_model_config(student.model).get_text_config()
    width = _BYTES[student.dtype]

    # Weights and the optimiser state of each.
    num_weights = num_parameters(student.model)
    num_trained = num_weights
    frozen_bytes = 0
    if student.lora:
        num_trained = num_adapter_parameters(student.model, student.lora)
        frozen_bytes = width * num_weights
    has_reference = loop.kl_coef and not student.lora

    # The sampler decodes some rows at once; an update takes a micro-batch of tokens.
    sequence = prompt_tokens + rollout.max_completion_tokens
    num_rollouts = rollout.prompts_per_batch * rollout.group_size
    rows = min(rollout.max_batch_rows, num_rollouts)
    tokens = min(loop.tokens_per_batch, num_rollouts * sequence)
    layers = shape.num_hidden_layers
    per_layer = 17 * width * shape.hidden_size * tokens
    activations = per_layer * layers
    if student.gradient_checkpointing:
        activations = per_layer + width * shape.hidden_size * layers * tokens

    return MemoryEstimate(
        student_weights=4 * num_trained + frozen_bytes,
        gradients_and_optimizer=12 * num_trained,
        teacher_weights=teacher_bytes(
            teacher, num_trained, device, num_initial=0 if student.lora else num_weights
        ),
        reference_weights=4 * num_weights if has_reference else 0,
        sampler_cache=rows * room_for(sequence) * 2 * layers * _key_size(shape) * width,
        activations=activations,
        logits=4 * _num_logits(shape.vocab_size, rows, tokens, device),
    )


def teacher_bytes(teacher: Any, num_trained: int, device: str, *, num_initial: int = 0) -> int:
    """Count the bytes of the weights that a teacher adds to the memory of the student's device.

    A served teacher adds none, nor does an adapter, which uses the student's base model.
    `num_initial` weights are loaded again if the initial student is needed besides the current
    one.
    """
    num_bytes = 0
    for _, one in single_teachers(teacher):
        if isinstance(one, EMATeacherConfig):
            num_bytes += 0 if one.is_student else 4 * num_trained
            num_bytes += 0 if one.trust_region is None else 4 * num_initial
        elif isinstance(one, LocalTeacherConfig) and _is_on(one, device):
            width = _BYTES[one.dtype]
            if one.quantization == "none":
                num_bytes += width * num_parameters(one.model)
            else:
                num_bytes += quantized_bytes(one.model, one.quantization, width)
    return num_bytes


def free_and_total_memory(device: str) -> tuple[int, int]:
    """Measure the bytes of a device's memory: what is free now, and the total."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def compare_memory(needed: MemoryEstimate, *, free: int, total: int) -> Finding:
    """Compare an estimate with a device. More than the free memory is an error."""
    parts = ", ".join(
        f"{name.replace('_', ' ')} {size / _GIB:.2f}"
        for name, size in asdict(needed).items()
        if size
    )
    message = f"about {needed.total / _GIB:.2f} of {free / _GIB:.1f} GiB that are free ({parts})"
    if needed.total <= free:
        return Finding("ok", "memory", message)
    if needed.models > total:
        what = (
            f"weights and optimiser alone need more than the {total / _GIB:.1f} GiB of the device; "
            "use a smaller model, [student.lora], teacher.quantization, or a served teacher."
        )
        return Finding("error", "memory", f"{message}; {what}")
    what = (
        "lower optimization.tokens_per_batch or rollout.max_batch_rows, or set "
        "student.gradient_checkpointing = true, or check with --force where the estimate is wrong"
    )
    return Finding("error", "memory", f"{message}; {what}.")


def _num_logits(vocabulary: int, rows: int, tokens: int, device: str) -> int:
    """Count the most numbers in tensors of logits that exist at once.

    Scoring needs a tile of logits, its float32 copy, and the log-probs or the gradient. Sampling
    needs the logits of the next token of all rows, and three times those of a chunk of rows. An
    objective over the whole vocabulary needs more tensors, with proportionally smaller tiles.
    """
    kind = device.partition(":")[0]
    chunk = min(rows, tokens_per_chunk(kind, vocabulary))
    tile = min(vocabulary * tokens, LOGITS_PER_TILE.get(kind, LOGITS_PER_TILE["cuda"]))
    return max(3 * tile, vocabulary * (rows + 3 * chunk))


def _is_on(teacher: LocalTeacherConfig, device: str) -> bool:
    """Return whether a teacher is on the student's device. `auto` means the student's; `cuda` is
    the first GPU."""
    first = {"cuda": "cuda:0"}
    own = device if teacher.device == "auto" else str(pick_device(teacher.device))
    return first.get(own, own) == first.get(device, device)


def _key_size(shape: Any) -> int:
    """Count the numbers in the keys of one token and layer; 0 for models without attention."""
    heads = getattr(shape, "num_attention_heads", None)
    if not heads:
        return 0
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return (getattr(shape, "num_key_value_heads", None) or heads) * head_size
