"""Check training mode, which gradient checkpointing needs: some models compute differently then."""

from torch import nn

from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.scoring.scorer import Scorer


def require_same_gradients(student: LanguageModel) -> None:
    """Raise `UserError` if trained weights have a gradient only in evaluation mode.

    In training mode, Gemma 3n reads the weights of some linear layers without calling the layers,
    so their adapters would never be trained.
    """
    reached = _weights_with_gradient(student, in_training=False)
    missed = sorted(reached - _weights_with_gradient(student, in_training=True))
    if missed:
        layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in missed}
        raise UserError(
            f"student.gradient_checkpointing = true, with which {len(missed)} trained weights of "
            f"{student.name!r} get no gradient (the first is {missed[0]!r}); set it to false, or "
            "name the layers of student.lora.target_modules without "
            f"{', '.join(sorted(layers))}."
        )


def _weights_with_gradient(student: LanguageModel, *, in_training: bool) -> set[str]:
    """Return the trained weights that a probe of four tokens reaches."""
    model: nn.Module = student.model
    scorer = Scorer(student, temperature=1.0, tokens_per_batch=4)
    model.train(in_training)
    try:
        scorer([range(2)], [range(2)], with_entropy=False).logprobs.sum().backward()
        return {name for name, one in model.named_parameters() if one.grad is not None}
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
