"""What a model's files say by themselves is what transformers says, or they are silent."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlad.config.run import RolloutConfig
from rlad.models.facts import _of_known_class, config_of, device_name, tokenizer_of
from rlad.models.files import (
    EMBEDDED,
    context_tokens,
    end_token_ids,
    num_stored_weights,
    plain_config,
)
from rlad.models.loading import load_model_config, load_tokenizer, pick_device
from rlad.models.parameter_counts import num_parameters
from rlad.models.plain_tokenizer import PlainTokenizer, plain_tokenizer
from rlad.rollouts.prompts import prompt_token_ids
from rlad.tasks import make_task
from rlad.teachers.compatibility import compare_tokenizers
from tiny_models import tiny_model
from tiny_runs import write_model

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
TEXTS = [
    "Don't  you'll\n\n\tsee 1234 km?",
    "naïve café ﬁ １２ 漢字 😀",
    " two  spaces ",
    "<|end|>",
    "",
]


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
    """A tied output layer that was stored all the same, a buffer, and a file that cannot be
    read."""
    for number, extra in enumerate(("lm_head.weight", "model.rotary_emb.inv_freq")):
        folder = write_model(tmp_path / str(number), seed=1, tie_word_embeddings=True)
        weights = load_file(folder / "model.safetensors")
        save_file(
            weights | {extra: weights["model.embed_tokens.weight"].clone()},
            folder / "model.safetensors",
        )
        assert num_stored_weights(str(folder)) is None
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert num_stored_weights(str(folder)) is None


# --- tokenizer --------------------------------------------------------------------------------------------------------


def write_byte_level_tokenizer(folder: Path, **settings: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )  # type: ignore[call-arg]
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", **settings
    ).save_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_plain_tokenizer_is_that_of_transformers(tmp_path, family):
    tiny_model(family, vocab_size=300).save_pretrained(tmp_path)
    write_byte_level_tokenizer(tmp_path)
    plain, whole = plain_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert plain is not None and type(whole).__name__ in (
        "TokenizersBackend",
        "PreTrainedTokenizerFast",
    )
    assert_same(plain, whole, TEXTS)


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_tokenizers_are_plain_for_the_embedded_task(name):
    task = make_task(
        "knights_and_knaves", num_people=[2, 3, 3], instructions=False, vary_names=False
    )
    problems = [task.problem(split, i) for split in ("train", "validation") for i in range(100)]
    plain = plain_tokenizer(name)
    assert plain is not None
    assert_same(
        plain,
        load_tokenizer(name),
        [text for problem in problems for text in (problem.prompt, problem.answer)],
    )


def assert_same(plain: PlainTokenizer, whole: Any, texts: list[str]) -> None:
    assert [plain(text) for text in texts] == [
        {"input_ids": whole(text)["input_ids"]} for text in texts
    ]
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
        {"eos_token": "2"},
        {"split_special_tokens": True},
        {"image_token": "<eos>"},
        {"added_tokens_decoder": {"7": {"content": "<new>"}}},
        {"added_tokens_decoder": {"1": {"content": "<eos>", "lstrip": True}}},
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


# --- chat templates -----------------------------------------------------------------------------------------------------

QWEN = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
LLAMA = """{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + eos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}"
    "{% endif %}"
)
CHAT_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<think>",
]
CONVERSATIONS = (
    "What is  1 + 1? ",
    (
        ("user", "1 + 1?"),
        ("assistant", "<think>\nhm</think>\n\n 2\n"),
        ("user", "a <|im_end|> naïve 漢字\n"),
    ),
)


def write_chat_model(folder: Path, family: str, template: str, **settings: Any) -> Path:
    """A byte-level model with special tokens of several kinds; `settings` go into
    tokenizer_config.json."""
    tiny_model(family, vocab_size=400).save_pretrained(folder)
    write_byte_level_tokenizer(
        folder, bos_token="<|begin|>", extra_special_tokens=CHAT_TOKENS, chat_template=template
    )
    change(folder, "tokenizer_config.json", **settings)
    return folder


@pytest.mark.parametrize("template", [QWEN, LLAMA, SMOLLM], ids=["qwen", "llama", "smollm"])
@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("qwen3", "Qwen2Tokenizer"),
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen3", "TokenizersBackend"),
        ("llama", "PreTrainedTokenizerFast"),
        ("llama", "TokenizersBackend"),
    ],
)
def test_a_chat_is_rendered_as_transformers_renders_it(tmp_path, template, family, named):
    """Class, every table of the backend, special tokens and the ids of chats; each template gives
    something of its own."""
    folder = str(write_chat_model(tmp_path, family, template, tokenizer_class=named))
    ours, whole = _of_known_class(folder), load_tokenizer(folder)
    assert (
        ours is not None
        and type(ours) is type(whole)
        and ours.chat_template == whole.chat_template == template
    )
    assert ours.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    assert (
        ours.special_tokens_map == whole.special_tokens_map
        and ours.special_tokens_map["bos_token"] == "<|begin|>"
    )
    for system_prompt in (None, "Think  step by step."):
        for asked in CONVERSATIONS:
            rollout = RolloutConfig(prompt_format="chat", system_prompt=system_prompt)
            ids = prompt_token_ids(ours, asked, rollout)
            assert ids == prompt_token_ids(whole, asked, rollout)
            text = whole.decode(ids)
            assert ("<|begin|>" in text) is (template == LLAMA) and (system_prompt or "") in text
            assert ("named SmolLM" in text) is (template == SMOLLM and system_prompt is None)


def test_a_template_of_its_own_file_and_its_variables(tmp_path):
    """chat_template.jinja wins over tokenizer_config.json, and `chat_template_kwargs` reach it."""
    folder = write_chat_model(
        tmp_path,
        "qwen3",
        QWEN,
        chat_template="{{ 'not this one' }}",
        tokenizer_class="Qwen2Tokenizer",
    )
    ours, whole = _of_known_class(str(folder)), load_tokenizer(str(folder))
    assert ours is not None and (folder / "chat_template.jinja").is_file()
    for thinking in (True, False):
        rollout = RolloutConfig(chat_template_kwargs={"enable_thinking": thinking})
        ids = prompt_token_ids(ours, "1 + 1?", rollout)
        assert ids == prompt_token_ids(whole, "1 + 1?", rollout)
        assert ("<think>" in whole.decode(ids)) is not thinking


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"tokenizer_class": "TokenizersBackend"}),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}),
        ("llama", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("qwen3", {"tokenizer_class": None}),
        ("qwen3", {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}),
    ],
)
def test_a_class_that_is_not_known_beforehand_is_for_transformers_to_choose(
    tmp_path, family, settings
):
    folder = write_chat_model(
        tmp_path, family, QWEN, **{"tokenizer_class": "Qwen2Tokenizer"} | settings
    )
    assert _of_known_class(str(folder)) is None


def test_files_that_cannot_be_read_are_named_as_ever(tmp_path):
    folder = write_chat_model(tmp_path, "qwen3", QWEN, tokenizer_class="TokenizersBackend")
    (folder / "tokenizer.json").write_text("{")
    assert _of_known_class(str(folder)) is None
    with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
        tokenizer_of(str(folder))


def test_a_tokenizer_with_a_chat_template_needs_no_torch(tmp_path):
    folders = [
        str(write_chat_model(tmp_path / family, family, LLAMA)) for family in ("llama", "qwen3")
    ]
    change(tmp_path / "qwen3", "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    code = (
        "import sys; from rlad.config.run import RolloutConfig; from rlad.models.facts import "
        "tokenizer_of; "
        "from rlad.rollouts.prompts import prompt_token_ids\n"
        "for name in sys.argv[1:]: assert prompt_token_ids(tokenizer_of(name), 'a', "
        "RolloutConfig(prompt_format='chat'))\n"
        "print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True False\n" and done.stderr == ""


# --- device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_device_is_named_as_it_is_picked(device):
    assert device_name(device) == str(pick_device(device))


def test_a_device_that_cannot_be_used_has_no_name():
    with pytest.raises(ValueError, match="device 'meta' cannot be used on this machine"):
        device_name("meta")
