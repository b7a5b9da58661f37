"""Whole runs in less than a second: models of 7 tokens that learn to add single digits, and what
such a run leaves behind."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import tomli_w
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlad.cli.main import main
from rlad.runs.checkpoints import MANIFEST, damage
from rlad.runs.directory import RunDirectory
from rlad.stopping import Stop, StopRequested
from tiny_models import tiny_model

WORDS = ("<pad>", "<eos>", "0", "1", "2", "+", "=")
SIZE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 1,
}
PROBLEMS = [
    {"prompt": f"{a} + {b} =", "answer": str((a + b) % 3)} for a in range(3) for b in range(3)
]
FILES = {"path": PROBLEMS[:5], "validation_path": PROBLEMS[5:7], "test_path": PROBLEMS[7:]}


OFTEN_CORRECT = {"verifier": "user_verifiers:last_digit"}
"""A task's verifier for runs that need both right and wrong completions: `number` reads none of the
random ones that hold several numbers."""


def write_tokenizer(folder: Path, words: tuple[str, ...] = WORDS, **settings: Any) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[2])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = {"eos_token": "<eos>", "pad_token": "<pad>"} | settings
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


def write_model(
    folder: Path, *, seed: int, words: tuple[str, ...] = WORDS, **settings: Any
) -> Path:
    """A random model with its tokenizer; returns the folder."""
    tiny_model(seed=seed, **{"vocab_size": len(words), **SIZE, **settings}).save_pretrained(folder)
    write_tokenizer(folder, words)
    return folder


def write_world(folder: Path) -> Path:
    """`student`, `teacher` and files of problems; returns the folder."""
    write_model(folder / "student", seed=1)
    write_model(folder / "teacher", seed=2)
    for name, problems in FILES.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(problem) + "\n" for problem in problems)
        )
    return folder


def run_config(world: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """The config of a run of 4 steps in `world`; the keys of a section that is given replace or
    join those here."""
    files = {name: str(world / f"{name}.jsonl") for name in FILES}
    config: dict[str, Any] = {
        "run_dir": str(run_dir),
        "student": {"model": str(world / "student")},
        "teacher": {"model": str(world / "teacher")},
        "task": {"type": "jsonl", "verifier": "number", **files},
        "rollout": {"prompts_per_batch": 4, "group_size": 3, "max_completion_tokens": 4},
        "optimization": {"num_steps": 4, "learning_rate": 3e-3},
        "evaluation": {
            "every_steps": 2,
            "num_validation_problems": 2,
            "num_test_problems": 2,
            "num_validation_samples": 4,
            "num_test_samples": 4,
        },
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section if isinstance(section, dict) else section
    return config


def objective_section(name: str) -> dict[str, Any]:
    """The section of an objective whose defaults fit into a vocabulary of 7."""
    return {"type": name} | ({"top_k": 3} if name in ("sdpo", "mopd") else {})


class StopAt(Stop):
    """Stops the run at its `at`-th safe point, as a signal just before it would."""

    num_checks = 0

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        StopAt.num_checks = 0

    def check(self) -> None:
        StopAt.num_checks += 1
        if StopAt.num_checks == self.at:
            raise StopRequested(signal.SIGINT)


def remains(run_dir: Path) -> dict[str, Any]:
    """Everything a run leaves behind that must not depend on whether it was interrupted, by name:
    all but time and memory."""
    run = RunDirectory(run_dir)
    kept: dict[str, Any] = {
        name: (run_dir / name).read_text() for name in ("samples.jsonl", "eval.jsonl", "README.md")
    }
    for name in ("warnings.jsonl", "skills.jsonl"):
        kept[name] = list(run.read(name))
    rows = list(run.read("metrics.jsonl"))
    kept["metrics.jsonl"] = [
        json.dumps(
            {
                k: v
                for k, v in row.items()
                if not k.startswith(("time/", "memory/", "teacher/overlap"))
            }
        )
        for row in rows
    ]
    for step, folder in run.checkpoints():
        assert damage(folder) is None
        for file in sorted(
            path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
        ):
            kept[f"step {step}: {file.relative_to(folder)}"] = _content(file)
    return kept


def _content(file: Path) -> Any:
    if file.name == "state.json":
        state = json.loads(file.read_text())
        (state.get("pending") or {}).pop("seconds", None)
        return json.dumps(state)
    if file.suffix != ".safetensors":
        return file.read_bytes()
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def write_unreachable_answers(folder: Path) -> str:
    """Problems whose answers the student has no words for."""
    path = folder / "unreachable.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"= {i}", "answer": "unreachable"}) + "\n" for i in range(3))
    )
    return str(path)


def rlad_fails(*arguments: object, code: int = 2) -> str:
    """The sentence that the command ends with; no traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("rlad: ")]
    assert len(lines) == 1 and re.search(r"[.?]$", lines[0]) and "Traceback" not in result.output, (
        result.stderr
    )
    return lines[0]


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(config))
    return path
