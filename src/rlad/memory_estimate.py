"""How much memory a run needs, from the models' configs alone, and how much is free."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlad.config import LoraConfig, RunConfig
from rlad.language_model import load_model_config, pick_device
from rlad.lora import add_lora
from rlad.teacher_config import (
    AdapterTeacherConfig,
    CachedTeacherConfig,
    EMATeacherConfig,
    LocalTeacherConfig,
    PrivilegedTeacherConfig,
    SeveralTeachersConfig,
)
from rlad.teachers.compatibility import Finding
from rlad.tensors import LOGITS_PER_CHUNK, MIN_CHUNK_TOKENS

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
    twice that in float32; with gradient checkpointing one layer's, plus the layer inputs. Logits: three times those of a chunk
    of tokens, or of a whole micro-batch where a model caps or scales them; for `gkd` of a whole micro-batch, for student and
    teacher, with their log-probs.
    """
    rollout, loop, student = config.rollout, config.optimization, config.student
    model = _weightless_model(student.model)
    shape, width, num_weights = model.config.get_text_config(), _BYTES[student.dtype], _num_parameters(model)
    num_trained = _num_adapter_parameters(model, student.lora, student.model) if student.lora else num_weights
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    sequence, num_rollouts = prompt_tokens + rollout.max_completion_tokens, rollout.prompts_per_batch * rollout.group_size
    tokens = min(loop.tokens_per_batch, num_rollouts * sequence)
    per_layer = 17 * width * hidden * tokens
    checkpointed = per_layer + width * hidden * layers * tokens
    device, teacher = pick_device(student.device), config.teacher if config.needs_teacher else None
    scored = [(shape, tokens), *_scored_by(teacher, shape, num_rollouts * sequence, device)]
    logits = (
        4 * shape.vocab_size * tokens if config.objective.type == "gkd" else max(_num_logits(*one, device) for one in scored)
    )
    return MemoryEstimate(
        student_weights=4 * num_trained + (width * num_weights if student.lora else 0),
        gradients_and_optimizer=12 * num_trained,
        teacher_weights=teacher_bytes(teacher, num_trained, device),
        reference_weights=4 * num_weights if loop.kl_coef and not student.lora else 0,
        sampler_cache=min(rollout.max_batch_rows, num_rollouts) * sequence * 2 * layers * _key_size(shape) * width,
        activations=checkpointed if student.gradient_checkpointing else per_layer * layers,
        logits=4 * logits,
        logprobs=4 * _NUM_LOGPROBS * num_rollouts * rollout.max_completion_tokens,
    )


def teacher_bytes(teacher: Any, num_trained: int, device: torch.device) -> int:
    """The weights that a teacher adds to the memory of the student's device."""
    num_bytes = 0
    for _, one in single_teachers(teacher):
        if isinstance(one, LocalTeacherConfig) and _is_on(one, device):
            num_bytes += _weights_bytes(_weightless_model(one.model), one)
        elif isinstance(one, EMATeacherConfig) and one.update_rate != 1:
            num_bytes += 4 * num_trained
    return num_bytes  # what is served is elsewhere, and an adapter stands on the student's own base model


def single_teachers(teacher: Any, name: str = "teacher") -> Iterator[tuple[str, Any]]:
    """The sections of the teachers that score by themselves, with what to call them: those inside of wrappers."""
    match teacher:
        case None:
            return
        case SeveralTeachersConfig():
            for key, one in teacher.teachers.items():
                yield from single_teachers(one, f"{name} {key}")
        case PrivilegedTeacherConfig() | CachedTeacherConfig():
            yield from single_teachers(teacher.teacher, name)
        case _:
            yield name, teacher


def _is_on(teacher: LocalTeacherConfig, device: torch.device) -> bool:
    return teacher.device == "auto" or pick_device(teacher.device).type == device.type


def _weights_bytes(model: PreTrainedModel, settings: LocalTeacherConfig) -> int:
    """Quantised are the linear layers but the output layer."""
    width, head, total = _BYTES[settings.dtype], model.get_output_embeddings(), 0
    if settings.quantization != "none":
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear) and layer is not head:
                total += _quantized_bytes(layer, settings.quantization) - width * layer.weight.numel()
    return total + width * _num_parameters(model)


def _quantized_bytes(layer: torch.nn.Linear, quantization: str) -> int:
    """As torchao stores weights: int8 with a float32 scale and an int8 zero point for each output; int4 with a scale and a
    zero point in bfloat16 for each 64 inputs of each output.
    """
    if quantization == "int8":
        return layer.weight.numel() + 5 * layer.out_features
    return layer.weight.numel() // 2 + 4 * layer.out_features * -(-layer.in_features // 64)


def _scored_by(
    teacher: Any, student: PretrainedConfig, num_tokens: int, device: torch.device
) -> Iterator[tuple[PretrainedConfig, int]]:
    """The teachers on the student's device, each with the most tokens that it scores at once."""
    for _, one in single_teachers(teacher):
        if isinstance(one, LocalTeacherConfig) and _is_on(one, device):
            yield load_model_config(one.model).get_text_config(), min(one.tokens_per_batch, num_tokens)
        elif isinstance(one, AdapterTeacherConfig | EMATeacherConfig):
            yield student, min(one.tokens_per_batch, num_tokens)


def _num_logits(shape: PretrainedConfig, tokens: int, device: torch.device) -> int:
    """Numbers held at once while `tokens` are scored: logits, their float32 copy, and the log-probs or the gradient."""
    in_chunk = LOGITS_PER_CHUNK.get(device.type, LOGITS_PER_CHUNK["cuda"]) // shape.vocab_size
    return 3 * shape.vocab_size * (tokens if _transforms_logits(shape) else min(tokens, max(MIN_CHUNK_TOKENS, in_chunk)))


def _transforms_logits(shape: PretrainedConfig) -> bool:
    """Whether a config says that logits are more than the output layer's. `rlad.scoring.linear_head` asks the model itself."""
    scales = (getattr(shape, name, None) for name in ("logit_scale", "logits_scaling"))
    return bool(getattr(shape, "final_logit_softcapping", None)) or any(scale not in (None, 1) for scale in scales)


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


def _num_adapter_parameters(model: PreTrainedModel, lora: LoraConfig, name: str) -> int:
    with torch.device("meta"):
        add_lora(model, lora, base=name, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
