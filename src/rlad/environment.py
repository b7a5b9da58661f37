"""With what a run is made: the contents of its `run.json`."""

import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("rlad", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def describe_environment(seed: int) -> dict[str, Any]:
    """Command, versions, commit, machine, seed and time."""
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.argv,
        "seed": seed,
        "versions": versions,
        "commit": commit(Path(__file__).parents[2]),
        "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, ending in `-dirty` when files differ from it; None for an installed package."""
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return None
    command = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
