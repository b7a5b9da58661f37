"""The examples and the README's code run as they are."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_what_trrd_does_to_each_token(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "01_trrd_on_tensors.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for fate in ("reinforced", "held back", "protected", "punished", "clamped"):
        assert fate in printed
    assert "losses differ by 0, gradients by 0" in printed


def test_the_objective_on_plain_tensors_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec("\n".join(blocks), {})
    assert capsys.readouterr().out == "tensor([[False,  True, False]])\n"


def character_tokenizer() -> PreTrainedTokenizerFast:
    letters = ["<eos>", "<pad>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=" ")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def test_the_tiny_loop_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = character_tokenizer()
    for name, seed in (("student", 0), ("teacher", 1)):
        model = tiny_model(
            vocab_size=len(tokenizer),
            eos_token_id=0,
            pad_token_id=1,
            seed=seed,
            max_position_embeddings=1024,
        )
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    monkeypatch.setattr(sys, "argv", ["02_tiny_loop.py", *folders, "--steps", "1"])
    runpy.run_path(str(EXAMPLES / "02_tiny_loop.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 1
    assert all("loss" in line and "nan" not in line for line in lines)
