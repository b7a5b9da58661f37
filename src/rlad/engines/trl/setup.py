"""What every trainer of TRL gets from a run of ours, and how its model is put back behind it."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from rlad.config.run import RunConfig
from rlad.engines.trl.arguments import loop_arguments
from rlad.models.loading import LanguageModel


class Watched(Trainer):
    """May be stopped before every micro-batch, and reports nothing to anybody."""

    before_work: Callable[[], None]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.before_work()
        return super().training_step(*args, **kwargs)

    def _send_telemetry(self) -> None:
        pass


def trainer_arguments(
    kind: Any, config: RunConfig, student: LanguageModel, folder: str, *, longest: int, num_processes: int = 1, **own: Any
) -> Any:
    """Of all trainers, as a `kind`: our budget and optimiser, float32 unless the student computes otherwise, no output."""
    on_cpu = student.model.device.type == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL 1.16 itself sets what newer versions of transformers rename
        arguments = kind(
            output_dir=folder,
            **loop_arguments(config, longest=longest, num_processes=num_processes),
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **own,
        )
    # One device, even where there are more: TRL refuses to spread a process over several.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def adamw(config: RunConfig, student: LanguageModel) -> torch.optim.Optimizer:
    """As in the native engine; transformers' own would not decay the weights of norms and biases."""
    loop = config.optimization
    return torch.optim.AdamW(
        student.model.parameters(), lr=loop.learning_rate, betas=loop.betas, weight_decay=loop.weight_decay
    )


@contextmanager
def config_untouched(model: PreTrainedModel) -> Iterator[None]:
    """Trainers write their own padding token and `use_cache = False` into a model's configs, and so into its checkpoints."""
    config, generation_config = copy.deepcopy(vars(model.config)), copy.deepcopy(model.generation_config)
    yield
    vars(model.config).update(config)
    model.generation_config = generation_config


def unwrap(trainer: Trainer, model: PreTrainedModel) -> None:
    """Take off a model what a trainer has put around it, ready to be sampled from."""
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)  # TRL's, with its fused head
    model.eval()
