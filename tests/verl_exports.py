"""Runs exported to verl by the command line, and the overrides that verl is called with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlad.cli.main import main

SMALL = (
    "optimization.num_steps=3",
    "rollout.prompts_per_batch=4",
    "evaluation.num_validation_problems=3",
)


def export(folder: Path, *arguments: str) -> Path:
    """The command of an exported run."""
    pytest.importorskip("pyarrow", reason="verl reads Parquet files: pip install 'rlad[datasets]'")
    gpus = ("--gpus-per-node", "1", "--teacher-gpus-per-node", "1")
    result = CliRunner().invoke(
        main, ["export", "verl", *arguments, *gpus, "--output", str(folder)]
    )
    assert result.exit_code == 0, result.output
    return folder / "run.sh"


def overrides_of(command: Path, *more: str) -> list[str]:
    """The overrides with which the script calls verl, as Bash hands them on."""
    stub = command.with_name("stub")
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", command, *more],
        env={"PYTHON": str(stub), "PATH": "/bin:/usr/bin"},
        capture_output=True,
    )
    stub.unlink()
    arguments = json.loads(done.stdout)
    assert arguments[:2] == ["-m", "verl.trainer.main_ppo"]
    return arguments[2:]
