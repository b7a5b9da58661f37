"""What is known of a model before its weights are loaded."""

from pathlib import Path
from typing import Any

import pytest

from rlad.models.files import EMBEDDED
from rlad.models.loading import load_language_model
from rlad.models.sizes import num_parameters
from rlad.models.without_weights import load_model_config, load_tokenizer
from tiny_runs import write_model


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model '.*' cannot be found or read"):
        load_model_config(str(tmp_path))


@pytest.mark.parametrize("content", ["{", None])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, content):
    folder = write_model(tmp_path, seed=1)
    if content is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_weights(tmp_path, tied):
    folder = write_model(tmp_path / "model", seed=1, tie_word_embeddings=tied)
    model: Any = load_language_model(str(folder)).model
    assert num_parameters(str(folder)) == sum(p.numel() for p in model.parameters())
    (folder / "model.safetensors").unlink()
    assert num_parameters(str(folder)) > 0


@pytest.mark.parametrize("name", EMBEDDED)
def test_parameters_of_the_embedded_models(name):
    model: Any = load_language_model(name).model
    assert num_parameters(name) == sum(p.numel() for p in model.parameters())
    assert Path(EMBEDDED[name]).is_dir()
