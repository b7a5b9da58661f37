"""Choose and start the sampler of a run: `rollout.engine`."""

import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedModel

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.models.adapters import adapts_tied_embeddings, has_adapter
from rlad.models.language_part import language_parameters
from rlad.models.loading import LanguageModel
from rlad.models.vision import sees
from rlad.rollouts.sampling import OwnSampler
from rlad.rollouts.types import Sampler
from rlad.rollouts.vllm_pictures import TESTED, vllm_model
from rlad.rollouts.vllm_protocol import TESTED_VLLM
from rlad.rollouts.vllm_sampler import VLLMSampler, prepare_environment
from rlad.rollouts.vllm_server import VLLMServerSampler
from rlad.text import first_line

LOWEST_TEMPERATURE = 0.01


def make_sampler(
    student: LanguageModel,
    rollout: RolloutConfig,
    before_work: Callable[[], None] = lambda: None,
) -> Sampler:
    """Start the sampler that a run asks for; `auto` uses vLLM if there is no obstacle.

    The model may be a teacher, which writes the completions of `sft`. `before_work` is called while
    waiting for a server; it may raise. Raises `UserError` for vLLM if there is an obstacle.
    """
    if rollout.engine == "native":
        return OwnSampler(student, rollout)
    has_servers = bool(rollout.vllm.urls)
    obstacle = _obstacle_to_servers(student) if has_servers else obstacle_to_vllm(student)
    if rollout.temperature < LOWEST_TEMPERATURE:
        obstacle = f"vLLM cannot sample at a temperature below {LOWEST_TEMPERATURE}"
    if obstacle is None and has_servers:
        return VLLMServerSampler(student, rollout, before_work)
    if obstacle is None:
        return VLLMSampler(student, rollout)
    if rollout.engine == "auto":
        return OwnSampler(student, rollout, because=obstacle)
    raise UserError(
        f"rollout.engine = 'vllm', but {obstacle}; set it to 'native', or to 'auto', which uses "
        "vLLM only if it can."
    )


def beside_another(rollout: RolloutConfig) -> RolloutConfig:
    """Return the settings of one of two samplers: only one vLLM of a process can sleep."""
    awake = rollout.vllm.model_copy(update={"sleep": "never"})
    return rollout.model_copy(update={"vllm": awake})


def of_teacher(rollout: RolloutConfig) -> RolloutConfig:
    """Return the settings for sampling from a teacher: servers have only the student."""
    if not rollout.vllm.urls:
        return rollout
    here = {"engine": "native", "vllm": rollout.vllm.model_copy(update={"urls": ()})}
    return rollout.model_copy(update=here)


def obstacle_to_vllm(student: LanguageModel) -> str | None:
    """Return what keeps vLLM from sampling for a student in this process; None if nothing does."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    prepare_environment()
    try:
        vllm: Any = import_module("vllm")
    except (ImportError, OSError) as error:
        return f"vLLM cannot be imported ({first_line(error)})"
    device_type = import_module("vllm.platforms").current_platform.device_type
    model = student.model
    architecture = type(model).__name__
    if not vllm.__version__.startswith(f"{TESTED_VLLM}."):
        return f"vLLM {vllm.__version__} is installed, but {TESTED_VLLM} is the tested version"
    if device_type != model.device.type:
        return f"this vLLM is for {device_type}, but the student is on {model.device}"
    if model.device.index:
        return f"vLLM would use the first GPU, but the student is on {model.device}"
    if architecture not in vllm.ModelRegistry.get_supported_archs():
        return f"vLLM does not know {architecture}"
    if obstacle := obstacle_to_hand_over(student) or _obstacle_to_features(student):
        return obstacle
    return _obstacle_on_cpu(model) if model.device.type == "cpu" else None


def _obstacle_to_features(student: LanguageModel) -> str | None:
    """Return what keeps vLLM from reading the features of a student's pictures."""
    if student.vision is None:
        return None
    kind = student.model.config.model_type
    if kind not in TESTED:
        return f"vLLM is not known to accept the features that a tower of {kind!r} computes"
    architecture = type(student.model).__name__
    try:
        vllm_model(architecture)
    except ImportError as error:
        return f"vLLM cannot import {architecture} ({first_line(error)})"
    return None


def _obstacle_to_servers(student: LanguageModel) -> str | None:
    if student.vision is not None and not student.vision.keeps_features:
        return "its vision tower is trained, and servers get only the language part"
    return obstacle_to_hand_over(student)


def obstacle_to_hand_over(student: LanguageModel) -> str | None:
    """Return why a student's weights cannot be handed over to a model in vLLM; None if they can."""
    model = student.model
    if getattr(model.config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if adapts_tied_embeddings(model):
        return "its adapter changes one of two tied embeddings, which vLLM keeps as one"
    if has_adapter(model) and student.compute_dtype != torch.float32:
        return "B A of its adapter would be lost to rounding when added to weights in bfloat16"
    if _has_other_names(model):
        return "its experts, convolutions or buffers have other names in vLLM"
    return None


def _has_other_names(model: PreTrainedModel) -> bool:
    """Return whether a model has more than matrices and vectors. Only those can be handed over by
    the names in its files."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    handed_over = parameters.values()
    if sees(model.config):
        kept = language_parameters(model)
        handed_over = [one for one in handed_over if id(one) in kept]
    return any(one.dim() > 2 for one in handed_over) or bool(
        model.state_dict().keys() - parameters.keys()
    )


def _obstacle_on_cpu(model: Any) -> str | None:
    attention: Any = import_module("vllm.v1.attention.backends.cpu_attn")
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = attention.CPUAttentionBackend.get_supported_head_sizes()
    if size in sizes:
        return None
    return f"vLLM's attention on the CPU takes heads of {sizes}, but the student's have {size}"
