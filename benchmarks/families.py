"""Every causal-LM family of the installed transformers at a tiny size: can rlad train it?

    python benchmarks/families.py [--only llama mamba] [--seconds 60] [--json FILE]

A random model of each family writes completions, which are scored in micro-batches. Three numbers
are compared with one forward pass of the model itself for each completion, by itself, whole logits
in float64: the sampler's log-probs, the scorer's, and the gradient of their sum. Each family has a
process of its own that is ended after `--seconds` of processor time, whatever else the machine
does: "too slow" is no result, and is counted by itself. Prints a table in Markdown.
"""

import argparse
import json
import multiprocessing
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from rlad.errors import RladError
from rlad.models.loading import LanguageModel, remove_dropout
from rlad.rollouts.decoders import cache_rows_can_be_dropped
from rlad.rollouts.sampling import sample
from rlad.scoring.scorer import Scorer
from tiny_models import PAD, VOCABULARY, random_tokens, tiny_tokenizer

TEMPERATURE = 0.7
LIMIT = 1e-3
"""nats, or the share of a gradient's length; rounding of float32 is far below"""

# Sizes by the names that configs have for them; a family gets those that its config has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "linear_num_key_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "linear_num_value_heads": 4,
    "attention_head_dim": 16,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "sliding_window": 5,
    "rotary_dim": 4,
    "time_step_rank": 4,
    "word_embed_proj_dim": 32,
    "attention_hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "query_pre_attn_scalar": 8,
    "use_mamba_kernels": False,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_PART = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
# What a tiny size needs besides, where a default belongs to a larger one.
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gpt_oss", "gemma2", "gemma3_text", "cohere2", "olmo3", "ministral"), _MIXED),
    **dict.fromkeys(("dots1", "exaone4", "vaultgemma", "gemma4_text", "afmoe"), _MIXED),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), _LINEAR),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _LINEAR),
    "blt": {
        "patcher_config": _PART,
        "encoder_config": _PART | {"hidden_size_global": 32},
        "decoder_config": _PART | {"hidden_size_global": 32},
        "global_config": _PART,
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 2},
    "bloom": {"hidden_size": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": _MIXED
    | {
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 2,
        "intermediate_size": [64] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5, "num_heads": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_dim": 32, "block_ff_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {
        "layer_types": ["conv", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
    },
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 6,
        "no_rope_layers": [1, 0],
        "intermediate_size_mlp": 64,
    },
    "mamba2": {"num_heads": 8, "expand": 2},
    "minimax": _LINEAR | {"block_size": 4},
    "qwen4_exp_text": _LINEAR
    | {
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 8,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 64,
    },
    "xlstm": {"chunk_size": 64, "num_heads": 2},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "recurrent_gemma": {"attention_window_size": 5, "block_types": ["recurrent", "attention"]},
    "zamba2": {
        "hybrid_layer_ids": [1],
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
    },
}


def has_parts(family: str) -> bool:
    """Say whether a family's text part is a family of its own."""
    defaults = CONFIG_MAPPING[family]()
    return defaults.get_text_config() is not defaults


def tiny_config(family: str) -> Any:
    defaults = CONFIG_MAPPING[family]()
    known = {*defaults.to_dict(), *defaults.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    # Where the two names of one size are known, the model's own is enough.
    for alias, own in defaults.attribute_map.items():
        if alias in sizes and own in sizes:
            del sizes[alias]
    if "kv_lora_rank" in known:  # latent attention has a key for each query
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
    tokens = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 1}
    return CONFIG_MAPPING[family](
        **sizes | FAMILIES.get(family, {}) | tokens | {"tie_word_embeddings": False}
    )


def tiny_model(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    if sum(one.numel() for one in model.parameters()) > 30_000_000:
        raise ValueError("its config has other names for its sizes")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    remove_dropout(model)
    return model.float().eval()


def look_at(family: str) -> dict[str, Any]:
    """Compare sampler, scorer and gradient with the model's own forward pass."""
    try:
        if has_parts(family):
            return {"verdict": "several parts"}
        model = tiny_model(family)
    except Exception as error:
        return {"verdict": "not made", "why": f"{type(error).__name__}: {error}"}
    student = LanguageModel(family, model, tiny_tokenizer(), (1, 2), PAD, torch.float32)
    prompts = random_tokens(1, 3, 9, 4)
    how: dict[str, Any] = {"group_size": 2, "temperature": TEMPERATURE, "seed": 5}
    groups = sample(student, prompts, max_completion_tokens=20, **how)
    written = [(prompt, one) for prompt, each in zip(prompts, groups, strict=True) for one in each]
    sequences = ([prompt for prompt, _ in written], [one.token_ids for _, one in written])
    scorer = Scorer(student, temperature=TEMPERATURE, tokens_per_batch=64)
    scores = scorer.score(*sequences)
    whole = [own_logprobs(model, prompt, one.token_ids).detach() for prompt, one in written]
    found = {
        "decoder": "own" if cache_rows_can_be_dropped(model) else "generate",
        "head": "tiles" if scorer.head is not None else "whole",
        "sampler": max(
            float((torch.tensor(one.logprobs).double() - right).abs().max())
            for (_, one), right in zip(written, whole, strict=True)
        ),
        "scorer": max(
            float((ours.double() - right).abs().max())
            for ours, right in zip(scores, whole, strict=True)
        ),
    }
    ours = gradient(model, lambda: scorer([sequences[0][2]], [sequences[1][2]]).logprobs.sum())
    right = gradient(model, lambda: own_logprobs(model, *sequences_of(written[2])).sum())
    found["gradient"] = float((ours - right).norm() / right.norm())
    is_right = max(found["sampler"], found["scorer"], found["gradient"]) <= LIMIT
    return found | {"verdict": "right" if is_right else "differs"}


def sequences_of(written: Any) -> tuple[list[int], Any]:
    prompt, completion = written
    return prompt, completion.token_ids


def own_logprobs(model: Any, prompt: list[int], completion: Any) -> Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.double() / TEMPERATURE).log_softmax(dim=-1)
    return logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def gradient(model: Any, make_sum: Any) -> Tensor:
    model.zero_grad()
    make_sum().backward()
    return torch.cat(
        [
            (torch.zeros_like(one) if one.grad is None else one.grad).double().flatten()
            for one in model.parameters()
        ]
    )


def _work(family: str, seconds: int, results: Any) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        found = look_at(family)
    except RladError as error:
        found = {"verdict": "refused", "why": str(error)}
    except Exception as error:
        found = {"verdict": "fails", "why": f"{type(error).__name__}: {error}"}
    results.put(found)


def in_a_process(family: str, seconds: int) -> dict[str, Any]:
    """Look at a family in a process of its own."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=_work, args=(family, seconds, results))
    process.start()
    process.join()
    if not results.empty():
        return results.get()
    if process.exitcode == -signal.SIGPROF:
        return {"verdict": "too slow", "why": f"no result in {seconds} s of processor time"}
    return {"verdict": "fails", "why": f"its process ended with {process.exitcode}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    families = options.only or sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))
    started = time.monotonic()
    table = {}
    print("| family | decoder | output layer | sampler | scorer | gradient | |")
    print("|---|---|---|---|---|---|---|")
    for family in families:
        table[family] = found = in_a_process(family, options.seconds)
        numbers = " | ".join(
            f"{found[key]:.0e}" if key in found else "" for key in ("sampler", "scorer", "gradient")
        )
        why = " ".join(str(found.get("why", "")).split()).replace("|", "/")[:120]
        said = f"{found['verdict']}{': ' * bool(why)}{why}"
        print(
            f"| {family} | {found.get('decoder', '')} | {found.get('head', '')} | {numbers} "
            f"| {said} |",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(table, indent=1))
    print_groups(table)
    print(f"\ntransformers {transformers.__version__}, {time.monotonic() - started:.0f} s")


def print_groups(table: dict[str, dict[str, Any]]) -> None:
    """Print which families have the same result, and the largest error of those that are right."""
    groups: dict[str, list[str]] = {}
    for family, found in table.items():
        how = f", {found['decoder']}, {found['head']}" if found["verdict"] == "right" else ""
        groups.setdefault(found["verdict"] + how, []).append(family)
    print("\n| what | families |\n|---|---|")
    for what, families in sorted(groups.items()):
        print(f"| {what} ({len(families)}) | {', '.join(families)} |")
    right = [found for found in table.values() if found["verdict"] == "right"]
    worst = {
        key: max(found[key] for found in right) if right else 0.0
        for key in ("sampler", "scorer", "gradient")
    }
    print(f"\n{len(table)} families, {len(right)} right, at most {worst}")


if __name__ == "__main__":
    main()
