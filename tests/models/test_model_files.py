"""What is known of a model before its weights are loaded."""

from pathlib import Path
from typing import Any

import pytest

from rlad.models.files import EMBEDDED
from rlad.models.loading import load_language_model
from rlad.models.sizes import num_parameters
from rlad.models.without_weights import load_model_config, load_tokenizer
from rlad.rollouts.sampling import sample
from rlad.scoring.scorer import Scorer
from tiny_models import tiny_model, tiny_tokenizer
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


def test_a_model_that_returns_more_than_logits_returns_logits_alone(tmp_path):
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    settings |= {"output_hidden_states": True}
    tiny_model("mixtral", return_dict=False, **settings).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))

    (group,) = sample(
        loaded, [[5, 6]], group_size=2, max_completion_tokens=5, temperature=1.0, seed=1
    )
    ids = [one.token_ids for one in group]
    scores = Scorer(loaded, temperature=1.0, tokens_per_batch=100).score([[5, 6]] * 2, ids)
    for one, score in zip(group, scores, strict=True):
        assert one.logprobs == pytest.approx(score.tolist(), abs=1e-5)
    assert not loaded.model.config.output_router_logits
