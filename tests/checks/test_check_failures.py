"""What fails in a check is a finding of one sentence where it is a user's mistake; a bug keeps its
traceback."""

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from rlad.checks.check import check_run
from rlad.cli.main import main
from rlad.config.file import parse_config
from tiny_runs import run_config, write_config


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
    ],
)
def test_a_want_of_memory_is_one_sentence(world, tmp_path, monkeypatch, error):
    """The report stays whole."""

    def failing(_: Any) -> None:
        raise error

    monkeypatch.setattr("rlad.checks.check.run_trial", failing)
    toml = write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run"))
    result = CliRunner().invoke(main, ["check", str(toml), "--json"])
    findings = json.loads(result.stdout)["findings"]
    errors = [f["subject"] for f in findings if f["level"] == "error"]
    assert result.exit_code == 2 and errors == ["trial"]
    assert "lower rollout.max_batch_rows" in findings[-1]["message"]


@pytest.mark.parametrize("place", ["run_trial", "require_working_verifier", "estimate_memory"])
def test_a_bug_in_a_check_keeps_its_traceback(world, tmp_path, monkeypatch, place):
    def failing(*_: Any) -> None:
        raise ValueError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr(f"rlad.checks.check.{place}", failing)
    with pytest.raises(ValueError, match="zip"):
        check_run(parse_config(run_config(world, tmp_path / "run")))
