"""LoRA adapters inside a transformers model, which stays a `PreTrainedModel`. No other file imports
peft.

    y = W x + alpha / rank * B (A x)        A [rank, in], B [out, rank]; W does not change

An adapter's folder has PEFT's format: adapter_config.json, which names the base model, and
adapter_model.safetensors. Adapter weights are float32, whatever the type of the base model.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rlad.config.run import LoraConfig
from rlad.errors import UserError, require_package
from rlad.models.files import read_adapter_config, resolvable, unreadable_adapter
from rlad.models.language_part import language_parameters, vision_modules
from rlad.models.vision import auto_class, sees
from rlad.text import first_line

STUDENT = "default"
"""The name of a model's own adapter, as in PEFT."""
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def add_lora(model: PreTrainedModel, settings: LoraConfig, *, base: str, seed: int) -> None:
    """Add a new adapter that has no effect yet: B = 0, and PEFT draws A from `seed`. Only the
    adapter is trainable. In a vision model, only the language part gets an adapter.

    Call this on the CPU, so that A does not depend on the device. Raises `UserError` for target
    modules that the model does not have.
    """
    config = peft_config(settings, base=base)
    targets = settings.target_modules
    targets = targets if isinstance(targets, str) else list(targets)
    if sees(model.config):
        config.exclude_modules = set(vision_modules(model))
    try:
        _add(model, config, STUDENT)
    except ValueError as error:
        raise UserError(
            f"student.lora.target_modules = {targets!r} does not fit model {base!r} "
            f"({first_line(error)}); name linear layers of it such as "
            '["q_proj", "v_proj"], or use "all-linear".'
        ) from None
    # PEFT has drawn A in the dtype of the base model; draw it again in float32.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in _layers(model).values():
            layer.reset_lora_parameters(STUDENT, init_lora_weights=True)


def peft_config(settings: LoraConfig, *, base: str) -> Any:
    """Return PEFT's config of `[student.lora]`."""
    import peft

    targets = settings.target_modules
    config = peft.LoraConfig(
        r=settings.rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=resolvable(base),
    )
    config.lora_alpha = settings.alpha  # type: ignore[assignment] (PEFT only divides it by r)
    return config


def require_lora_fits(settings: LoraConfig, model_config: PretrainedConfig, *, base: str) -> None:
    """Raise `UserError` if a model of this shape lacks the target modules."""
    with torch.device("meta"):
        add_lora(auto_class(model_config).from_config(model_config), settings, base=base, seed=0)


def load_adapter(model: PreTrainedModel, folder: str, name: str = STUDENT) -> None:
    """Add the adapter of a folder. It becomes the active and only trainable one.

    Raises `UserError` if the folder is damaged or its adapter does not fit the model.
    """
    import peft

    # PEFT's own loading ignores missing tensors; here all are compared, then copied.
    saved = _read_weights(folder)
    kind = read_adapter_config(folder).get("peft_type")
    try:
        config: Any = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        if kind == "LORA" and model.device.type == "meta":
            config.init_lora_weights = True  # other ways need weights, which are absent here
        _add(model, config, name)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"adapter {folder!r} (peft_type = {kind!r}) cannot be added to its base model "
            f"({first_line(error)}); give a LoRA adapter of that model, or merge it into its base "
            "model first."
        ) from None
    weights = _weights(model, name)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    found = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    differing = sorted(dict(shapes.items() ^ found.items()))
    if differing:
        first = differing[0]
        raise UserError(
            f"the weights of adapter {folder!r} do not fit: {len(differing)} tensors differ, the "
            f"first is {first!r} with shape {found.get(first, 'missing')} instead of "
            f"{shapes.get(first, 'none')}; its base model is another one, or it is damaged."
        )
    with torch.no_grad():
        for key, tensor in weights.items():
            tensor.copy_(saved[key])


def add_frozen_adapter(model: PreTrainedModel, folder: str) -> str:
    """Add the adapter of a folder to a student that has its own, which stays active and trainable.
    Returns the new adapter's name."""
    name = f"frozen{len(adapter_names(model))}"
    load_adapter(model, folder, name)
    model.set_adapter(STUDENT)
    return name


@contextmanager
def only_adapter(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Let a student compute with only its adapter `name`, or (None) with only its base weights.
    Afterwards its own adapter is active and trainable again."""
    if name is None:
        model.disable_adapters()
    else:
        model.set_adapter(name)
    try:
        yield
    finally:
        model.enable_adapters()
        model.set_adapter(STUDENT)


def save_adapter(model: PreTrainedModel, folder: Path, name: str = STUDENT) -> None:
    """Write only the adapter, in PEFT's format."""
    weights = {_PREFIX + key: tensor.cpu() for key, tensor in _weights(model, name).items()}
    config: Any = model.peft_config[name]  # type: ignore[attr-defined]
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same order each time
    if isinstance(config.exclude_modules, set):
        config.exclude_modules = sorted(config.exclude_modules)
    config.save_pretrained(str(folder))
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})


def merge_adapter(model: PreTrainedModel) -> None:
    """Add the active adapter, if there is one, to the weights under it. The model is then a plain
    one.

    Tied embeddings of which only one has an adapter are untied, since they differ after merging.
    """
    # Tied embeddings share one matrix, so the output layer gets its own before merging.
    layers = _layers(model)
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if adapts_tied_embeddings(model):
        output = getattr(embeddings[1], "base_layer", embeddings[1])
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    # Each layer is replaced by the plain one under it, with B A added.
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    if layers:
        del model.peft_config  # type: ignore[attr-defined]
        model._hf_peft_config_loaded = False


def merged_weights(
    model: PreTrainedModel, *, language_part: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield each effective weight of a model by its own name, tied ones once. With `language_part`,
    yield only the weights of a vision model's language part.

    For a layer with an adapter this is W + alpha / rank * B A, a new tensor; W does not change.
    """
    layers = _layers(model)
    kept = language_parameters(model) if language_part else None
    for name, parameter in model.named_parameters():
        if kept is not None and id(parameter) not in kept:
            continue
        layer, _, last = name.rpartition(".base_layer.")
        if layer and last == "weight" and _holds_own_adapter(layers[layer]):
            delta = layers[layer].get_delta_weight(STUDENT)
            yield f"{layer}.weight", (parameter.detach() + delta).to(parameter.dtype)
        elif layer:
            yield f"{layer}.{last}", parameter.detach()
        elif not any(name.startswith(f"{one}.") for one in layers):
            yield name, parameter.detach()


def adapts_tied_embeddings(model: PreTrainedModel) -> bool:
    """Return whether an adapter changes one of two embeddings that share a matrix."""
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return is_tied and any(
        layer in embeddings and _holds_own_adapter(layer) for layer in _layers(model).values()
    )


def _holds_own_adapter(layer: Any) -> bool:
    """Return whether a layer has a part of the model's own adapter, not only of a teacher's."""
    return STUDENT in layer.lora_A or STUDENT in layer.lora_embedding_A


def adapter_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's adapters."""
    return list(getattr(model, "peft_config", {}))


def has_adapter(model: PreTrainedModel) -> bool:
    """Return whether a model has its own adapter."""
    return STUDENT in adapter_names(model)


# --- before weights are loaded --------------------------------------------------------------------


def require_shareable(folder: str, base_config: PretrainedConfig) -> None:
    """Raise `UserError` unless the folder has a LoRA adapter that does not change base weights and
    fits this base model."""
    config = read_adapter_config(folder)
    # Some initialisations change the base weights before A and B are added.
    init = str(config.get("init_lora_weights"))
    replaces = {
        "modules_to_save": config.get("modules_to_save"),
        "trainable_token_indices": config.get("trainable_token_indices"),
        "bias": config.get("bias", "none") != "none",
        "init_lora_weights": init.startswith(("pissa", "corda", "olora", "loftq", "lora_ga")),
    }
    changes = [setting for setting, is_set in replaces.items() if is_set]
    if config.get("peft_type") != "LORA" or changes:
        raise UserError(
            f"adapter {folder!r} (peft_type = {config.get('peft_type')!r}) changes weights of the "
            f"base model by {', '.join(changes) or 'its type'}; only plain LoRA can share the "
            "student's weights: take type = 'local' with this folder as its model."
        )
    require_loadable(folder, base_config)


def require_loadable(folder: str, base_config: PretrainedConfig) -> None:
    """Raise `UserError` unless an adapter's folder is complete and fits its base model, whose
    weights are not loaded."""
    require_package("peft", f"adapter {folder!r}")
    # Names and shapes show on the meta device, where a model has no weights.
    with torch.device("meta"):
        load_adapter(auto_class(base_config).from_config(base_config), folder)


def _read_weights(folder: str) -> dict[str, Tensor]:
    """Load the tensors of an adapter's folder by their names in the model."""
    try:
        tensors = load_file(Path(folder) / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise unreadable_adapter(folder, _WEIGHTS, error) from None
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


# --- layers ---------------------------------------------------------------------------------------


def _add(model: PreTrainedModel, config: Any, name: str) -> None:
    """Add layers for an adapter: float32, active, the only trainable ones, without content yet.
    Global random state does not change."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    base = config.base_model_name_or_path
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT warns of several adapters, and of layers with transposed weights.
        warnings.simplefilter("ignore")
        model.add_adapter(config, name)
    config.base_model_name_or_path = base  # transformers replaces it by its cached path
    cast_adapter_dtype(model, name)


def _weights(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Return the live tensors of an adapter by their names in its file, without PEFT's prefix."""
    import peft

    return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)  # type: ignore[arg-type]


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """Return the layers that have adapters, by name."""
    if not adapter_names(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    }
