"""LoRA adapters inside a transformers model, which stays a `PreTrainedModel`. The only file that
imports peft.

    y = W x + alpha / rank * B (A x)        A [rank, in], B [out, rank]; W stands still

An adapter folder is as PEFT writes it: adapter_config.json, which names the base model, and
adapter_model.safetensors. The weights of adapters are float32, whatever those of the base model
are.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlad.config.run import LoraConfig
from rlad.errors import UserError
from rlad.models.files import read_adapter_config, require_peft, resolvable, unreadable

STUDENT = "default"
"""the name under which a model holds its own adapter, as in PEFT"""
WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."

# These set the base weights to something else before A and B are added.
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def add_lora(model: PreTrainedModel, settings: LoraConfig, *, base: str, seed: int) -> None:
    """A new adapter that changes nothing yet: B = 0 and A drawn by PEFT from `seed`. It alone is
    trainable.

    Call it on the CPU: A does not depend on the device then. Raises `UserError` for target modules
    that are not there.
    """
    import peft

    targets = (
        settings.target_modules
        if isinstance(settings.target_modules, str)
        else list(settings.target_modules)
    )
    config = peft.LoraConfig(
        r=settings.rank, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    config.lora_alpha = settings.alpha  # type: ignore[assignment] (PEFT only divides it by r)
    try:
        _inject(model, config, STUDENT)
    except ValueError as error:
        raise UserError(
            f"student.lora.target_modules = {targets!r} does not fit model {base!r} "
            f"({str(error).splitlines()[0]}); name "
            'linear layers of it such as ["q_proj", "v_proj"], or take "all-linear".'
        ) from None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in _lora_layers(model):
            layer.reset_lora_parameters(STUDENT, init_lora_weights=True)
    config.base_model_name_or_path = resolvable(base)
    _sort_targets(config)


def load_adapter(model: PreTrainedModel, folder: str, name: str = STUDENT) -> None:
    """Add the adapter of a folder. It becomes the active and the only trainable one.

    Raises `UserError` when the folder is damaged or its adapter does not fit the model.
    """
    import peft

    saved = read_weights(folder)
    config: Any = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    _inject(model, config, name)
    weights = _weights(model, name)
    require_fit(folder, {key: tuple(tensor.shape) for key, tensor in saved.items()}, weights)
    with torch.no_grad():
        for key, tensor in weights.items():
            tensor.copy_(saved[key])
    _sort_targets(config)


def add_frozen_adapter(model: PreTrainedModel, folder: str) -> str:
    """Add the adapter of a folder without using it: what is active and what is trainable stays so.
    Returns its name."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    name = f"frozen{len(getattr(model, 'peft_config', {}))}"
    load_adapter(model, folder, name)
    for layer in _lora_layers(model):
        layer.set_adapter([STUDENT] if has_adapter(model) else [name])
        layer.enable_adapters(has_adapter(model))
    model.requires_grad_(False)
    for parameter, was_trainable in trainable:
        parameter.requires_grad_(was_trainable)
    return name


def adapter_names(model: PreTrainedModel) -> list[str]:
    """The adapters that a model holds."""
    return list(getattr(model, "peft_config", {}))


def save_adapter(model: PreTrainedModel, folder: Path, name: str = STUDENT) -> None:
    """The adapter alone, as PEFT writes and reads it."""
    weights = {
        PREFIX + key: tensor.detach().cpu().contiguous()
        for key, tensor in _weights(model, name).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[name].save_pretrained(str(folder))  # type: ignore[attr-defined]


def merge_adapter(model: PreTrainedModel) -> None:
    """Add the active adapter, if there is one, to the weights under it: the model is then a plain
    one, without adapters.

    Tied embeddings of which one alone has an adapter are untied: merged, they are two.
    """
    wrapped = set(_lora_layers(model))
    layers: dict[str, Any] = {
        name: layer for name, layer in model.named_modules() if layer in wrapped
    }
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if is_tied and wrapped & {model.get_input_embeddings(), model.get_output_embeddings()}:
        _untie(model)
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if layers:
        model._hf_peft_config_loaded = False
        del model.peft_config  # type: ignore[attr-defined]


def _untie(model: PreTrainedModel) -> None:
    output: Any = model.get_output_embeddings()
    output = output.get_base_layer() if hasattr(output, "get_base_layer") else output
    output.weight = torch.nn.Parameter(output.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def has_adapter(model: PreTrainedModel, name: str = STUDENT) -> bool:
    return name in getattr(model, "peft_config", {})


@contextmanager
def only_adapter(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Within it the model computes with its adapter `name` alone, or (None) with its base weights
    alone; afterwards as before.

    PEFT makes an adapter trainable when it is switched on, and not when it is switched off: those
    flags come back too.
    """
    layers = _lora_layers(model)
    before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for layer in layers:
            if name is not None:
                layer.set_adapter([name])
            layer.enable_adapters(name is not None)
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for layer, active, is_disabled in before:
            layer.set_adapter(active)
            layer.enable_adapters(not is_disabled)
        for parameter, was_trainable in trainable:
            parameter.requires_grad_(was_trainable)


def require_shareable(folder: str, base_config: PretrainedConfig) -> None:
    """`UserError` unless the folder holds a LoRA adapter that leaves base weights as they are and
    fits this base model."""
    config = read_adapter_config(folder)
    init = config.get("init_lora_weights")
    if config.get("peft_type") != "LORA":
        raise UserError(f"it is a {config.get('peft_type')} adapter; {_only_lora(folder)}")
    if (
        config.get("modules_to_save")
        or config.get("bias", "none") != "none"
        or config.get("trainable_token_indices")
    ):
        raise UserError(
            "it replaces weights of the base model (modules_to_save, bias or tokens); "
            f"{_only_lora(folder)}"
        )
    if isinstance(init, str) and init.startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"its init_lora_weights = {init!r} changes the base weights; {_only_lora(folder)}"
        )
    _require_shapes(folder, base_config, "the student's base model")


def require_loadable(folder: str, base_config: PretrainedConfig) -> None:
    """`UserError` unless an adapter's folder is whole and of a type that PEFT adds to a model; a
    LoRA must fit its base."""
    require_peft(f"adapter {folder!r}")
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    peft_type = read_adapter_config(folder).get("peft_type")
    tuners: dict[Any, Any] = {
        each.value: tuner for each, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
    }
    tuner = tuners.get(str(peft_type))
    # Types that prepend to a prompt, and those whose layers share tensors, need a model class of
    # PEFT's own.
    if (
        tuner is None
        or not issubclass(tuner, BaseTuner)
        or getattr(tuner, "uses_shared_state", False)
    ):
        raise UserError(
            f"adapter {folder!r} has peft_type = {peft_type!r}, which the installed peft cannot "
            "add to a model; give a LoRA "
            "adapter, or merge it into its base model first."
        )
    if peft_type == "LORA":
        _require_shapes(folder, base_config, "its base model")
    else:
        _read_shapes(folder)


def _require_shapes(folder: str, base_config: PretrainedConfig, base: str) -> None:
    """`UserError` unless the tensors of a LoRA folder fit the model of a config, which is not
    loaded."""
    import peft

    shapes = _read_shapes(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base_config)
        try:
            config: Any = peft.PeftConfig.from_pretrained(folder)
            config.init_lora_weights = (
                True  # none that would compute with weights that are not there
            )
            _inject(model, config, STUDENT)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"adapter {folder!r} does not fit {base} ({str(error).splitlines()[0]})."
            ) from None
    require_fit(folder, shapes, _weights(model, STUDENT))


def _only_lora(folder: str) -> str:
    return f"only plain LoRA can share the student's weights: take type = 'local' with model = {folder!r}."


def require_fit(folder: str, saved: dict[str, tuple[int, ...]], wanted: dict[str, Tensor]) -> None:
    """`UserError` unless a folder's tensors have the names and shapes that its adapter has in the
    base model."""
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    if differing := sorted(
        key for key in shapes.keys() | saved.keys() if shapes.get(key) != saved.get(key)
    ):
        first = differing[0]
        raise UserError(
            f"the weights of adapter {folder!r} do not fit: {len(differing)} tensors differ, the "
            f"first is {first!r} with shape "
            f"{saved.get(first, 'missing')} instead of {shapes.get(first, 'none')}; its base "
            "model is another one, or it is damaged."
        )


def read_weights(folder: str) -> dict[str, Tensor]:
    """The tensors of an adapter folder, by their name in the model. `UserError` when they cannot
    be read."""
    try:
        return {
            key.removeprefix(PREFIX): tensor
            for key, tensor in load_file(Path(folder) / WEIGHTS).items()
        }
    except (OSError, SafetensorError) as error:
        raise UserError(unreadable(folder, WEIGHTS, error)) from None


def _read_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
            keys = file.keys()  # the file itself cannot be iterated over
            return {key.removeprefix(PREFIX): tuple(file.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError) as error:
        raise UserError(unreadable(folder, WEIGHTS, error)) from None


def _inject(model: PreTrainedModel, config: Any, name: str) -> None:
    """Layers for an adapter, float32, active and alone trainable; they hold nothing yet. Leaves
    global randomness."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of several adapters, and of layers that hold their weights transposed
        model.add_adapter(config, name)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name or parameter_name.endswith(f".{name}"):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        else:
            parameter.requires_grad_(False)


def _sort_targets(config: Any) -> None:
    """PEFT's set of module names would be written in another order each time."""
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)


def _weights(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """The live tensors of an adapter by their name in its file, without PEFT's prefix."""
    import peft

    return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)  # type: ignore[arg-type]


def _lora_layers(model: PreTrainedModel) -> list[Any]:
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
