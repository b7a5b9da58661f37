"""The recipe of the embedded models still makes their kind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loaded_scripts import load_script
from rlad.models.loading import load_language_model

SCRIPT = Path(__file__).parents[2] / "recipes" / "embedded_models" / "make.py"


@pytest.fixture(scope="module")
def make():
    return load_script(SCRIPT)


def test_tokenizer_and_shape_are_those_of_the_embedded_student(make):
    embedded = load_language_model("embedded/student")
    tokenizer = make.make_tokenizer()
    assert tokenizer.get_vocab() == embedded.tokenizer.get_vocab()
    shapes = {name: p.shape for name, p in make.build(tokenizer).named_parameters()}
    assert shapes == {name: p.shape for name, p in embedded.model.named_parameters()}


def test_a_model_of_another_size_learns(make):
    tokenizer = make.make_tokenizer()
    model = make.build(tokenizer, 32, 1, 2)
    phase = replace(make.BASE, num_steps=100, batch_size=8)
    ids, labels = next(make.batches(replace(phase, seed=5), tokenizer))

    def loss():
        with torch.no_grad():
            return float(model(input_ids=ids, labels=labels).loss)

    before = loss()
    make.pretrain(model, phase, tokenizer)
    assert model.config.hidden_size == 32 and loss() < before - 1  # nats a token
