"""Which runs several processes can make. Every mistake is one `ValueError`."""

import os
from collections.abc import Sequence

from rlad.config.objective import TRAINED_BY_TRL
from rlad.config.run import RunConfig
from rlad.config.teacher import with_those_inside


def num_ranks() -> int:
    """How many processes make this run, as torchrun and others say it in the environment; 1 where nobody does."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first_rank() -> bool:
    """Whether this process writes and speaks for all."""
    return num_ranks() == 1 or os.environ["RANK"] == "0"


def launch_kind() -> str:
    """How Accelerate is told to train: ddp, which one process is too, fsdp2 or deepspeed."""
    return "fsdp2" if _flag("ACCELERATE_USE_FSDP") else "deepspeed" if _flag("ACCELERATE_USE_DEEPSPEED") else "ddp"


def require_same_launch(kind: str, number: int) -> None:
    """`ValueError` unless this process can read the optimiser's state that `number` processes of a kind have written."""
    if kind != launch_kind():
        raise ValueError(
            f"its optimiser state was written by {kind} and this is {launch_kind()} (ddp: one process, too); go on with "
            f"--launch {kind}."
        )
    if kind == "deepspeed" and number != num_ranks():
        raise ValueError(f"DeepSpeed goes on with as many processes as wrote it, {number}, and these are {num_ranks()}.")


def uses_gpus(config: RunConfig) -> bool:
    import torch

    return config.student.device != "cpu" and torch.cuda.is_available()


def require_possible(config: RunConfig, number: int) -> None:
    """`ValueError` unless this process can be one of `number` that make the run."""
    if number == 1:
        require_not_alone_by_mistake(_command_of_parent())
        if config.splits_teacher:
            raise ValueError(
                "engine.trl.teacher_is_sharded splits the teacher over processes, and this is one alone; start several (rlad "
                "train --launch ddp --num-processes 2, say), or leave it out."
            )
    else:
        require_several(config, f"this is one of {number}")
    require_divisible(config, number)
    require_devices(config, launch_kind(), int(os.environ.get("LOCAL_WORLD_SIZE", number)))


def require_several(config: RunConfig, found: str) -> None:
    """`ValueError` unless several processes can make this run; `found` says what calls for them."""
    by_trl_alone = config.objective.type in TRAINED_BY_TRL
    if by_trl_alone or config.engine.type != "trl":
        what = f"objective = {config.objective.type!r}" if by_trl_alone else "engine.type = 'native'"
        instead = "another objective with engine.type=trl" if by_trl_alone else "engine.type=trl"
        raise ValueError(f"{what} trains in one process, and {found}; start one alone, or use {instead}.")


def require_divisible(config: RunConfig, number: int) -> None:
    """`ValueError` unless each of `number` processes gets as many whole groups of every batch, and as much of every step."""
    from rlad.engines.trl.teacher_data import sequences_per_step  # which loads torch

    prompts, per_step = config.rollout.prompts_per_batch, sequences_per_step(config)
    possible = [n for n in range(1, prompts + 1) if prompts % n == 0 and per_step % n == 0]
    if number not in possible:
        raise ValueError(
            f"{number} processes cannot share rollout.prompts_per_batch = {prompts} prompts evenly, {per_step} completions in "
            f"each optimiser step; use {' or '.join(map(str, possible))} processes, or another batch."
        )


def require_devices(config: RunConfig, kind: str, number: int) -> None:
    """`ValueError` unless this machine has what `number` processes of this kind of training (ddp, fsdp2, deepspeed) need."""
    import torch

    if kind != "ddp" and not uses_gpus(config):
        instead = "would silently train by DDP instead" if kind == "fsdp2" else "does not train there"
        raise ValueError(
            f"{kind} needs GPUs: on the CPU Accelerate {instead}; use --launch ddp there (with torchrun or accelerate: no "
            f"configuration of {kind}), or a machine with GPUs."
        )
    if not uses_gpus(config):
        return
    if kind == "fsdp2" and config.needs_teacher and any(one.type == "ema" for one in with_those_inside(config.teacher)):
        raise ValueError(
            "the teacher is the student itself (type 'ema'), whose weights fsdp2 splits under it; use --launch ddp or "
            "deepspeed, or another teacher."
        )
    if ":" in config.student.device and number > 1:
        raise ValueError(
            f"student.device = {config.student.device!r} names one GPU, and {number} processes need one each; use 'auto'."
        )
    if number > torch.cuda.device_count():
        raise ValueError(
            f"{number} processes need a GPU each, and this machine has {torch.cuda.device_count()}; start fewer, or use "
            "student.device = 'cpu'."
        )


def require_not_alone_by_mistake(command: Sequence[str]) -> None:
    """`ValueError` when the parent's command is an `accelerate launch` of several that started this process alone."""
    words = [word for argument in command for word in argument.split("=", 1)]
    wanted = next((words[i + 1] for i, word in enumerate(words[:-1]) if word.replace("-", "_") == "__num_processes"), "1")
    if "launch" in words and any("accelerate" in word for word in words) and wanted.isdecimal() and int(wanted) > 1:
        raise ValueError(
            f"`accelerate launch --cpu` started one process instead of {wanted}, as it always does; use `rlad train RUN.toml "
            f"--launch ddp --num-processes {wanted}`, or `torchrun --nproc-per-node {wanted} -m rlad train RUN.toml`."
        )


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def _command_of_parent() -> list[str]:
    """Empty where it is nobody's or nobody may know it."""
    if not _flag("ACCELERATE_USE_CPU"):
        return []
    import psutil

    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent else []
    except psutil.Error:
        return []
