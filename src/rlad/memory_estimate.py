"""How much memory a run needs, from the models' configs alone, and how much is free."""

from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlad.config import LoraConfig, RunConfig
from rlad.language_model import load_model_config, pick_device
from rlad.lora import add_lora
from rlad.teacher_config import (
    CachedTeacherConfig,
    EMATeacherConfig,
    LocalTeacherConfig,
    PrivilegedTeacherConfig,
    SeveralTeachersConfig,
)
from rlad.teachers.compatibility import Finding

_GIB = 1024**3
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Student, old policy, sampler, teacher, reference: one float32 number a token each.
_NUM_LOGPROBS = 5


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the student's device; activations and logits are rules of thumb, the rest is counted."""

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
        return self.student_weights + self.gradients_and_optimizer + self.teacher_weights + self.reference_weights


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a device: what other programs leave now, and all of it."""

    free: int
    total: int


def estimate_memory(config: RunConfig, prompt_tokens: int) -> MemoryEstimate:
    """Weights that are trained are float32 (AdamW: weight, gradient and two moments are 16 bytes a parameter).

    Activations: about 34 bytes x hidden size a token and layer in 16 bit (arXiv 2205.05198, without the attention matrix),
    twice that in float32; with gradient checkpointing one layer's, plus the layer inputs. Logits: of a chunk of 256 tokens; for
    `gkd` of a whole micro-batch, for student and teacher, with their log-probs.
    """
    rollout, loop, student = config.rollout, config.optimization, config.student
    model = _weightless_model(student.model)
    shape, width, num_weights = model.config.get_text_config(), _BYTES[student.dtype], _num_parameters(model)
    num_trained = _num_adapter_parameters(model, student.lora) if student.lora else num_weights
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    sequence, num_rollouts = prompt_tokens + rollout.max_completion_tokens, rollout.prompts_per_batch * rollout.group_size
    tokens = min(loop.tokens_per_batch, num_rollouts * sequence)
    per_layer = 17 * width * hidden * tokens
    checkpointed = per_layer + width * hidden * layers * tokens
    teacher = teacher_bytes(config.teacher, num_trained, pick_device(student.device)) if config.needs_teacher else 0
    return MemoryEstimate(
        student_weights=4 * num_trained + (width * num_weights if student.lora else 0),
        gradients_and_optimizer=12 * num_trained,
        teacher_weights=teacher,
        reference_weights=4 * num_weights if loop.kl_coef and not student.lora else 0,
        sampler_cache=min(rollout.max_batch_rows, num_rollouts) * sequence * 2 * layers * _key_size(shape) * width,
        activations=checkpointed if student.gradient_checkpointing else per_layer * layers,
        logits=4 * shape.vocab_size * (4 * tokens if config.objective.type == "gkd" else 3 * 256),
        logprobs=4 * _NUM_LOGPROBS * num_rollouts * rollout.max_completion_tokens,
    )


def teacher_bytes(teacher: Any, num_trained: int, device: torch.device) -> int:
    """The weights that a teacher adds to the memory of the student's device."""
    match teacher:
        case LocalTeacherConfig():
            if teacher.device != "auto" and pick_device(teacher.device).type != device.type:
                return 0
            per_weight = {"none": _BYTES[teacher.dtype], "int8": 1, "int4": 0.5}[teacher.quantization]
            return int(_num_parameters(_weightless_model(teacher.model)) * per_weight)
        case SeveralTeachersConfig():
            return sum(teacher_bytes(one, num_trained, device) for one in teacher.teachers.values())
        case PrivilegedTeacherConfig() | CachedTeacherConfig():
            return teacher_bytes(teacher.teacher, num_trained, device)
        case EMATeacherConfig():
            return 0 if teacher.update_rate == 1 else 4 * num_trained
        case _:  # served elsewhere, or the student's own base model
            return 0


def memory_of(device: torch.device) -> Memory:
    if device.type == "cuda":
        return Memory(*torch.cuda.mem_get_info(device))
    memory = psutil.virtual_memory()
    return Memory(memory.available, memory.total)


def compare_memory(needed: MemoryEstimate, memory: Memory) -> Finding:
    """More than is free is doubtful; models that are larger than all of the memory cannot work."""
    parts = ", ".join(f"{name.replace('_', ' ')} {size / _GIB:.2f}" for name, size in asdict(needed).items() if size)
    message = f"about {needed.total / _GIB:.2f} of {memory.free / _GIB:.1f} GiB that are free ({parts})"
    if needed.models > memory.total:
        what = (
            f"weights and optimiser alone are more than the {memory.total / _GIB:.1f} GiB that there are; take a smaller "
            "model, [student.lora], teacher.quantization, or a served teacher."
        )
        return Finding("error", "memory", f"{message}; {what}")
    if needed.total <= memory.free:
        return Finding("ok", "memory", message)
    what = "lower optimization.tokens_per_batch or rollout.max_batch_rows, or set student.gradient_checkpointing = true"
    return Finding("warning", "memory", f"{message}; {what}")


def _key_size(shape: PretrainedConfig) -> int:
    """Numbers in the keys of one token and layer; 0 for models without attention."""
    heads = getattr(shape, "num_attention_heads", None)
    if not heads:
        return 0
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return (getattr(shape, "num_key_value_heads", None) or heads) * head_size


def _weightless_model(name: str) -> PreTrainedModel:
    config = load_model_config(name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"{name!r} is no causal language model ({str(error).splitlines()[0]}); give one.") from None


def _num_parameters(model: PreTrainedModel) -> int:
    """Tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _num_adapter_parameters(model: PreTrainedModel, lora: LoraConfig) -> int:
    with torch.device("meta"):
        add_lora(model, lora, base="the student", seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
