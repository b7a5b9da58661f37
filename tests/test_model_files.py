"""What a model's files say by themselves is what transformers says, or they are silent."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlad.language_model import load_model_config, load_tokenizer, pick_device
from rlad.model_facts import config_of, device_name, tokenizer_of
from rlad.model_files import EMBEDDED, context_tokens, end_token_ids, num_stored_weights, plain_config
from rlad.plain_tokenizer import PlainTokenizer, plain_tokenizer
from rlad.tasks import make_task
from rlad.teachers.compatibility import compare_tokenizers
from rlad.weightless import num_parameters
from tiny_models import tiny_model
from tiny_runs import write_model

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TEXTS = ["Don't  you'll\n\n\tsee 1234 km?", "naïve café ﬁ １２ 漢字 😀", " two  spaces ", "<|end|>", ""]


def change(folder: Path, name: str, **settings: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_plain_config_is_that_of_transformers(tmp_path, family):
    model = str(write_model(tmp_path, seed=1, family=family))
    plain, whole = plain_config(model), load_model_config(model)
    assert plain is not None and plain.model_type == whole.model_type == family
    assert [getattr(plain, size) for size in SIZES] == [getattr(whole, size) for size in SIZES]
    assert context_tokens(plain) == context_tokens(whole) == 256
    tokenizer = load_tokenizer(model)
    assert end_token_ids(plain, None, tokenizer) == end_token_ids(whole, None, tokenizer) == (1,)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_key_value_heads": None},
        {"hidden_size": 17},
        {"vocab_size": "7"},
        {"model_type": "gemma2"},
        {"architectures": ["LlamaModel"]},
        {"auto_map": {"AutoConfig": "own.Config"}},
    ],
)
def test_a_config_that_leaves_something_open_is_for_transformers(world, tmp_path, settings):
    folder = write_model(tmp_path, seed=1)
    assert plain_config(str(folder)) is not None
    change(folder, "config.json", **settings)
    assert plain_config(str(folder)) is None and plain_tokenizer(str(folder)) is None


def test_no_model_is_for_transformers_to_name(tmp_path):
    assert plain_config("some/name") is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be found or read"):
        config_of(str(tmp_path))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_stored_weights_are_as_many_as_the_model_has(tmp_path, tied):
    folder = write_model(tmp_path / "model", seed=1, tie_word_embeddings=tied)
    assert num_stored_weights(str(folder)) == num_parameters(str(folder)) > 0
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert num_stored_weights(str(tmp_path / "shards")) == num_parameters(str(tmp_path / "shards"))


@pytest.mark.parametrize("name", EMBEDDED)
def test_stored_weights_of_the_embedded_models(name):
    assert num_stored_weights(name) == num_parameters(name)


def test_weights_that_do_not_speak_for_themselves_are_not_counted(tmp_path):
    """A tied output layer that was stored all the same, a buffer, and a file that cannot be read."""
    for number, extra in enumerate(("lm_head.weight", "model.rotary_emb.inv_freq")):
        folder = write_model(tmp_path / str(number), seed=1, tie_word_embeddings=True)
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {extra: weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
        assert num_stored_weights(str(folder)) is None
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert num_stored_weights(str(folder)) is None


# --- tokenizer --------------------------------------------------------------------------------------------------------


def write_byte_level_tokenizer(folder: Path, **settings: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **settings).save_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_plain_tokenizer_is_that_of_transformers(tmp_path, family):
    tiny_model(family, vocab_size=300).save_pretrained(tmp_path)
    write_byte_level_tokenizer(tmp_path)
    plain, whole = plain_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert plain is not None and type(whole).__name__ in ("TokenizersBackend", "PreTrainedTokenizerFast")
    assert_same(plain, whole, TEXTS)


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_tokenizers_are_plain_for_the_embedded_task(name):
    task = make_task("knights_and_knaves", num_people=[2, 3, 3], instructions=False, vary_names=False)
    problems = [task.problem(split, i) for split in ("train", "validation") for i in range(100)]
    plain = plain_tokenizer(name)
    assert plain is not None
    assert_same(plain, load_tokenizer(name), [text for problem in problems for text in (problem.prompt, problem.answer)])


def assert_same(plain: PlainTokenizer, whole: Any, texts: list[str]) -> None:
    assert [plain(text) for text in texts] == [{"input_ids": whole(text)["input_ids"]} for text in texts]
    assert plain.get_vocab() == whole.get_vocab() and len(plain) == len(whole)
    for name in ("bos_token", "eos_token", "pad_token", "eos_token_id", "chat_template"):
        assert getattr(plain, name) == getattr(whole, name), name
    assert plain.convert_ids_to_tokens([0, 3, 9]) == whole.convert_ids_to_tokens([0, 3, 9])
    assert {finding.level for finding in compare_tokenizers(plain, whole)} == {"ok"}


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"chat_template": "{{ messages }}"},
        {"add_bos_token": True},
        {"eos_token": "<new>"},
        {"added_tokens_decoder": {"7": {"content": "<new>"}}},
        {"additional_special_tokens": ["<new>"]},
        {"model_specific_special_tokens": {"image_token": "<new>"}},
    ],
)
def test_a_tokenizer_that_leaves_something_open_is_for_transformers(tmp_path, settings):
    folder = write_model(tmp_path, seed=1)
    assert isinstance(tokenizer_of(str(folder)), PlainTokenizer)
    change(folder, "tokenizer_config.json", **settings)
    assert plain_tokenizer(str(folder)) is None


def test_a_tokenizer_of_qwen2_is_for_transformers(tmp_path):
    """It takes a class of its own there, whatever the files say."""
    folder = write_model(tmp_path, seed=1, family="qwen2")
    assert plain_config(str(folder)) is not None and plain_tokenizer(str(folder)) is None


# --- device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_device_is_named_as_it_is_picked(device):
    assert device_name(device) == str(pick_device(device))


def test_a_device_that_cannot_be_used_has_no_name():
    with pytest.raises(ValueError, match="device 'meta' cannot be used on this machine"):
        device_name("meta")
