"""A run by TRL whose rollouts vLLM samples on the CPU, with an end token that the model's folder
does not name. A program for vLLM's environment, which prints the completions as JSON:

PYTHON tests/vllm_trl_run.py FOLDER [packed]
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # before vLLM is imported

import vllm._custom_ops

import rlad
from rlad.runs.directory import RunDirectory
from tiny_runs import run_config, write_model, write_world


def main(folder: Path, *, are_packed: bool) -> None:
    # On the CPU vLLM packs weights for oneDNN and throws the plain ones away, so that TRL could not
    # load new ones.
    vllm._custom_ops._supports_onednn = are_packed
    world = write_world(folder)
    # Its attention on the CPU wants heads of 32 numbers or more.
    student = str(write_model(folder / "wide", seed=1, hidden_size=128, head_dim=32))
    trl = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
    config = run_config(
        world,
        folder / "run",
        engine={"type": "trl", "trl": trl},
        student={"model": student, "end_tokens": ["0"]},
        rollout={"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 16},
        optimization={"num_steps": 2},
    )
    rlad.train(config)
    completions = [
        {
            "tokens": rollout["tokens"],
            "is_truncated": rollout["completion"]["is_truncated"],
        }
        for row in RunDirectory(folder / "run").read("samples.jsonl")
        for rollout in row["rollouts"]
    ]
    print(json.dumps(completions))


if __name__ == "__main__":
    main(Path(sys.argv[1]), are_packed="packed" in sys.argv[2:])
