"""Run directories with checkpoints as training writes them, without the training, and what a model
answers greedily."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlad.config.file import dump_config, parse_config
from rlad.models.loading import save_model
from rlad.models.student import load_student
from rlad.runs.directory import RunDirectory
from tiny_models import random_tokens, tiny_model, tiny_tokenizer
from tiny_runs import run_config

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROMPTS, LENGTH = random_tokens(3, 5, 4, 7), 24
LORA = {"rank": 3, "alpha": 6.0}


def write_run(
    folder: Path,
    *,
    scores: Sequence[float] = (0.5,),
    lora: Any = None,
    sizes: Any = None,
    **how: Any,
) -> Path:
    """A run directory with a checkpoint of other weights behind every step, one for each validation
    score."""
    if lora:
        pytest.importorskip("peft", reason="the optional package peft is not installed")
    tiny_model(seed=3, **(sizes or {})).save_pretrained(folder / "student")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "student")
    student = (
        {"model": str(folder / "student"), "device": "cpu"} | ({"lora": lora} if lora else {}) | how
    )
    config = parse_config(run_config(folder, folder / "run", student=student))
    run = RunDirectory(config.directory)
    run.path.mkdir()
    run.write("config.toml", dump_config(config))
    run.write("run.json", "{}")
    for step, score in enumerate(scores, start=1):
        trained = load_student(config)
        generator = torch.Generator().manual_seed(step)
        for parameter in trained.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        run.append("eval.jsonl", {"step": step, "split": "validation", "pass@1": {"mean": score}})
        run.write_checkpoint(
            step,
            lambda place, trained=trained: save_model(trained, place),
            run_digest=config.digest,
        )
    return run.path


def checkpoint(run: Path, step: int = 1) -> Path:
    return RunDirectory(run).checkpoint(step)


def answers(model: Any) -> list[list[int]]:
    """Greedy completions by transformers."""
    rows = [
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=LENGTH)[0]
        for prompt in PROMPTS
    ]
    return [row[len(prompt) :].tolist() for row, prompt in zip(rows, PROMPTS, strict=True)]


def answers_of_export(folder: Path, **how: Any) -> list[list[int]]:
    return answers(AutoModelForCausalLM.from_pretrained(folder, **how).eval())
