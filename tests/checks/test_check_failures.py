"""What fails in the trial of `rlad check` is one sentence, which says where."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

import rlad.checks.trial
from rlad.checks.check import check_run
from rlad.checks.trial import Trial
from rlad.cli.main import main
from rlad.config.file import parse_config
from tiny_runs import run_config, write_config


def test_what_torch_cannot_load_is_one_sentence(world, tmp_path, monkeypatch):
    """Whatever torch raises in the trial; the report stays whole."""
    toml = write_config(tmp_path / "run.toml", run_config(world, tmp_path / "run"))
    cases = (
        (
            RuntimeError("no kernel.\nmore"),
            "the models cannot be loaded and run (no kernel); change the device",
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: 8"),
            "not enough memory: 8); lower rollout.max_batch_rows",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "lower rollout.max_batch_rows"),
    )
    for error, sentence in cases:

        def failing(_: Any, error: RuntimeError = error) -> Trial:
            raise error

        monkeypatch.setattr("rlad.checks.trial.run_trial", failing)
        result = CliRunner().invoke(main, ["check", str(toml), "--json"])
        findings = json.loads(result.stdout)["findings"]
        assert result.exit_code == 2 and [
            f["subject"] for f in findings if f["level"] == "error"
        ] == ["trial"]
        assert sentence in findings[-1]["message"] and findings[-1]["message"].endswith(".")


def test_a_mistake_in_the_code_is_named_with_its_place(world, tmp_path, monkeypatch):
    """A product of matrices that do not fit, in the first thing that the trial asks the student
    for."""
    monkeypatch.setattr(
        "rlad.checks.trial.prompt_token_ids", lambda *_: torch.ones(2, 3) @ torch.ones(4, 5)
    )
    (error,) = check_run(parse_config(run_config(world, tmp_path / "run"))).errors
    place = re.search(
        r"shapes cannot be multiplied \(2x3 and 4x5\)\); .* \(it failed at rlad/trial\.py:(\d+)\)\.$",
        error.message,
    )
    assert place is not None, error.message
    source = Path(rlad.checks.trial.__file__).read_text(encoding="utf-8").splitlines()
    assert "prompt_token_ids(" in source[int(place[1]) - 1]
