"""`rlad models` on models of the Hugging Face hub that are not whole: from a hub on this machine,
by its own client."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlad.models.files import has_weights
from tiny_hub import COMMIT, tiny_hub
from tiny_models import tiny_model
from tiny_runs import write_tokenizer


def write_sharded(folder: Path) -> Path:
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    write_tokenizer(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def put_into_cache(cache: Path, files: Path, *, but: str) -> Path:
    """The files of `some/model` as transformers caches them, without those that `but` matches;
    returns their folder."""
    snapshot = cache / "models--some--model" / "snapshots" / COMMIT
    shutil.copytree(files, snapshot, ignore=shutil.ignore_patterns(but))
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text(COMMIT)
    return snapshot


def run_models(
    cache: Path, *arguments: str, address: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: huggingface_hub reads where its cache and the hub are when it is
    imported."""
    where = (
        {"HF_HUB_OFFLINE": "1"}
        if address is None
        else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
    )
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "COLUMNS": "200"} | where
    return subprocess.run(
        [sys.executable, "-m", "rlad", "models", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_model_without_safetensors_is_not_ready_and_nothing_of_it_is_fetched(tmp_path, is_cached):
    files, cache = write_sharded(tmp_path / "files"), tmp_path / "cache"
    for file in files.glob("*.safetensors*"):
        file.unlink()
    (files / "pytorch_model.bin").write_bytes(b"a pickle")
    if is_cached:
        put_into_cache(cache, files, but="nothing")
        offline = run_models(cache, "prepare", "some/model")
        assert (
            offline.returncode == 1
            and "'some/model' is not complete in the Hugging Face cache" in offline.stderr
        )
    with tiny_hub("some/model", files) as (address, handed_out):
        done = run_models(cache, "prepare", "some/model", address=address)
    assert done.returncode == 2 and "ready" not in done.stdout and handed_out == []
    assert done.stderr == (
        "rlad: model 'some/model' of the Hugging Face hub has no config.json with *.safetensors "
        "there, and no other weights are read (a pickle may run code); take another model, or "
        "convert it where you trust it with `save_pretrained`.\n"
    )


def test_of_a_model_with_a_shard_missing_the_rest_is_fetched(tmp_path):
    files, cache = write_sharded(tmp_path / "files"), tmp_path / "cache"
    missing = sorted(file.name for file in files.glob("*.safetensors"))[-1]
    snapshot = put_into_cache(cache, files, but=missing)
    assert not has_weights(snapshot) and has_weights(files)
    with tiny_hub("some/model", files) as (address, handed_out):
        done = run_models(cache, "prepare", "some/model", address=address)
    assert done.returncode == 0 and handed_out.count(missing) == 1, done.stderr
    assert has_weights(snapshot) and run_models(cache, "prepare", "some/model").returncode == 0
    (snapshot / "model.safetensors.index.json").unlink()
    assert not has_weights(snapshot), "shards alone do not say how many they are"
    (files / missing).unlink()
    (files / "model.safetensors").touch()
    assert has_weights(files), "transformers takes the one file, whatever an index says"
