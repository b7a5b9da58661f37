"""The last layer of a causal language model, which maps hidden states to logits."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from rlad.scoring.distributions import Distributions

# As configs call it: Cohere, Falcon H1; Granite; Gemma, RecurrentGemma.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """logits = capped(scale * linear(hidden)), capped(z) = soft_cap * tanh(z / soft_cap) or,
    without a cap, z."""

    linear: torch.nn.Linear
    scale: float = 1.0
    soft_cap: float | None = None

    def distributions(
        self, hidden: Tensor, *, temperature: float = 1.0, weight_grad: Tensor | None = None
    ) -> Distributions:
        """Make the distributions of hidden states `[N, hidden_size]`."""
        weight = self.linear.weight
        bias = self.linear.bias
        return Distributions(
            hidden, weight, bias, self.scale, self.soft_cap, temperature, weight_grad
        )


@torch.no_grad()
def output_layer(model: PreTrainedModel) -> OutputLayer | None:
    """Find the output layer of a model; None if its logits are another function of the last hidden
    state.

    The layer is read from the config and the output embeddings, and compared with the model's own
    logits of a probe of four tokens. Without such a layer the full logits are used: correct, but
    with memory that grows with tokens x vocabulary.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return None
    # A model may do anything between hidden states and logits, so the config's values are used only
    # if they give the model's own logits.
    ids = torch.arange(4, device=model.device)[None]
    below = model.base_model(input_ids=ids, use_cache=False)
    hidden = getattr(below, "last_hidden_state", None)
    logits = model(input_ids=ids, use_cache=False).logits
    # A few models, such as Llama 4's text part, have no model below their head.
    if hidden is None or hidden.shape[-1] != head.in_features:
        return None
    scale, soft_cap = _stated(model.config.get_text_config())
    if (scale, soft_cap) != (1, None):
        layer = OutputLayer(head, scale, soft_cap)
        ours = layer.distributions(hidden.flatten(0, -2)).logits().view_as(logits)
        # The model scales and caps in its own type, so allow a few roundings.
        if torch.allclose(
            ours, logits.to(ours.dtype), rtol=8 * torch.finfo(logits.dtype).eps, atol=0
        ):
            return layer
    # A plain layer must give them bit for bit.
    return OutputLayer(head) if torch.equal(head(hidden), logits) else None


def _stated(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return the scale and the soft cap that a config states."""

    def numbers(names: tuple[str, ...]) -> list[float]:
        return [float(value) for name in names if (value := getattr(config, name, None))]

    return prod(numbers(_MULTIPLIERS)) / prod(numbers(_DIVISORS)), min(numbers(_CAPS), default=None)
