"""What one of two ranks does in a test; each writes what came of it as JSON. A program: `rank_work.py NAME FOLDER`."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import get_total_norm

from rlad.config.file import load_config
from rlad.engines.processes.ranks import SeveralRanks
from rlad.engines.processes.sharded import as_number, parts_of, weights_here, whole_weights
from rlad.stopping import StopRequested
from rlad.teachers.base import TeacherRequest
from rlad.teachers.local import LocalTeacher
from tiny_models import random_tokens, tiny_model


def _raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except (Exception, StopRequested) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def exchange(ranks: SeveralRanks) -> dict[str, Any]:
    def fail_on_the_second() -> None:
        if ranks.index == 1:
            raise ValueError("no answer.")

    def fail() -> None:
        raise ValueError("no teacher.")

    def stop_on_the_second() -> None:
        if ranks.index == 1:
            raise StopRequested(signal.SIGTERM)

    return {
        "shares": [list(ranks.share(number)) for number in (4, 3, 1)],
        "together": ranks.together("work", lambda: ranks.index * 10),
        "from first": ranks.from_first("work", lambda: ranks.index + 5),
        "to first": ranks.to_first("work", ["ab"[ranks.index], "cd"[ranks.index]]),
        "largest": ranks.largest("work", {"b": 3.0 - ranks.index, "a": float(ranks.index)}),
        "one fails": _raised(lambda: ranks.together("work", fail_on_the_second)),
        "all fail": _raised(lambda: ranks.together("work", fail)),
        "first fails": _raised(lambda: ranks.from_first("work", fail)),
        "one stops": _raised(lambda: ranks.together("work", stop_on_the_second)),
        "one stops an update": _raised(lambda: ranks.agree(stop_on_the_second)),
        "after that": ranks.together("work", lambda: "still here"),
    }


def wait(ranks: SeveralRanks) -> dict[str, Any]:
    started = time.monotonic()
    if ranks.index == 1:
        time.sleep(4.0)
    error = _raised(lambda: ranks.together("the rollouts of step 3", lambda: None))
    return {"error": error, "seconds": time.monotonic() - started}


def shard(ranks: SeveralRanks) -> dict[str, Any]:
    """As many forward passes as the rank's number and one more; then a gradient."""
    model, whole = tiny_model(seed=3), tiny_model(seed=3)
    mesh, inputs = init_device_mesh("cpu", (2,)), torch.arange(3, 9)[None]
    split: Any = model
    for module in (*split.model.layers, split):
        fully_shard(module, mesh=mesh)
    held = sum(p.to_local().numel() for p in split.parameters())
    with torch.no_grad(), whole_weights(split):
        for _ in range(1 + 2 * ranks.index):
            logits = split(input_ids=inputs).logits
    wanted = whole(input_ids=inputs).logits
    split(input_ids=inputs).logits.square().sum().backward()
    wanted.square().sum().backward()
    return {
        "parts": len(parts_of(split)),
        "held": held / sum(p.numel() for p in whole.parameters()),
        "held after": sum(p.to_local().numel() for p in split.parameters()) / sum(p.numel() for p in whole.parameters()),
        "logits": float((logits - wanted).abs().max()),
        "norms": [as_number(get_total_norm([p.grad for p in model.parameters()])) for model in (split, whole)],
    }


def teacher(ranks: SeveralRanks, folder: Path) -> dict[str, Any]:
    """A run's local teacher split over both ranks and whole, asked about as many completions as the rank's number, and two."""
    from rlad.engines.trl.sharded_teacher import make_sharded_teacher
    from rlad.models.student import load_student
    from rlad.teachers import prepare_teacher

    config = load_config(str(folder / "run.toml"))
    student = load_student(config)
    whole, split = prepare_teacher(config, student), make_sharded_teacher(config, student)
    assert isinstance(whole, LocalTeacher)
    requests = [TeacherRequest(prompt, prompt[::-1]) for prompt in random_tokens(5, 3, 4, vocabulary=7)[: 2 + ranks.index]]
    held, all_of_it = (
        sum(weight.numel() for weight in weights_here(made._scorer.language_model.model)) for made in (split, whole)
    )
    return {
        "held": held / all_of_it,
        "identities": [split.identity, whole.identity],
        "whole": [row.tolist() for row in whole.logprobs(requests)],
        "split": [row.tolist() for row in split.logprobs(requests)],
    }


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = SeveralRanks(timeout_seconds=1.0 if name == "wait" else 60.0)
    works: dict[str, Callable[[SeveralRanks], Any]] = {"exchange": exchange, "wait": wait, "shard": shard}
    result = (works | {"teacher": partial(teacher, folder=folder)})[name](ranks)
    (folder / f"{ranks.index}.json").write_text(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
