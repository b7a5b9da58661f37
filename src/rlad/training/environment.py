"""The environment of a run: the contents of its `run.json`."""

import json
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlad.errors import UserError
from rlad.runs.directory import ENVIRONMENT, RunDirectory

PACKAGES = ("rlad", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def describe_environment(seed: int) -> dict[str, Any]:
    """Collect command, versions, commit, machine, seed and time."""
    versions = {"python": platform.python_version()} | {
        name: metadata.version(name) for name in PACKAGES
    }
    # Only a run that samples with vLLM has imported it.
    if "vllm" in sys.modules:
        versions["vllm"] = sys.modules["vllm"].__version__
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.argv,
        "seed": seed,
        "versions": versions,
        "commit": commit(Path(__file__).parents[3]),
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def note_resumption(run: RunDirectory, step: int, *, sampler: str) -> None:
    """Add the current versions to the `run.json` of a run that continues after `step`, if they have
    changed. Raises `UserError` if the run used another sampler before."""
    try:
        described = json.loads((run.path / ENVIRONMENT).read_text(encoding="utf-8"))
        now = describe_environment(described["seed"])
        sessions = [described, *described.get("resumed", [])]
        sampled_by = described.get("sampler", sampler)
        is_same = all(now[name] == sessions[-1][name] for name in ("versions", "commit"))
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{run.path / ENVIRONMENT} is not what a run has written; put back a copy of it, or "
            "start the run again with --overwrite."
        ) from None
    if sampled_by != sampler:
        raise UserError(
            f"{run.path} was sampled by {sampled_by}, but rollout.engine = 'auto' uses {sampler} "
            "here; resume it where vLLM is as it was, or start it again with --overwrite."
        )
    if not is_same:
        session = {"step": step} | {
            name: now[name] for name in ("command", "versions", "commit", "machine", "started")
        }
        run.write(
            ENVIRONMENT, json.dumps(described | {"resumed": [*sessions[1:], session]}, indent=2)
        )


def commit(checkout: Path) -> str | None:
    """Return the commit of a checkout, with `-dirty` at the end if files differ from it; None for
    an installed package."""
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return None
    command = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
