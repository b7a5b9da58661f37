"""An extension that runs in vLLM's own worker process:

vllm serve ... --worker-extension-cls rlad.rollouts.vllm_worker.StudentWeights

Needed on the CPU for models with tied embeddings. Imports nothing of the trainer.
"""

from importlib import import_module
from typing import Any


class StudentWeights:
    """An extension of vLLM's worker that loads all of a student's weights."""

    def load_student_weights(self, weights_path: str) -> None:
        """Load the weights in a folder."""
        worker: Any = self
        worker.reload_weights(weights_path=weights_path)
        repack_tied_output_layer(worker)


def repack_tied_output_layer(worker: Any) -> None:
    """Pack the output layer of tied embeddings again, on the CPU.

    vLLM 0.32 keeps a packed copy of the matrix there, which `reload_weights` does not update. Old
    weights would then silently be used for sampling.
    """
    model = worker.model_runner.model
    # A vision model has its own output layer, or that of its inner language model.
    language: Any = getattr(model, "language_model", None)
    head = getattr(model, "lm_head", None) or getattr(language, "lm_head", None)
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if worker.device.type == "cpu" and is_tied and head is not None:
        layers: Any = import_module("vllm.model_executor.layers.utils")
        layers.dispatch_cpu_unquantized_gemm(head, remove_weight=False)
