"""Write a Qwen2 model again with attention heads of size 32, under which it computes the same.

    python benchmarks/widen_heads.py src/rlad/embedded/student runs/wide-student

vLLM's attention on the CPU takes no heads of size 24, which the embedded models have. Hidden
states and heads are filled up with zeros, which stay zeros in training: no gradient reaches them.
What else depends on the sizes is scaled: the mean of squares in RMSNorm by hidden / wider,
attention's 1 / sqrt(head) in the queries, and theta of the rotary frequencies theta^(-2i / head),
so that a head of 32 has the same ones. At the end the logits of both models are compared.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HEAD = 32


def widen(folder: Path, out: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    num_heads = config.num_attention_heads
    hidden = config.hidden_size
    head = hidden // num_heads
    wider = HEAD * num_heads
    # Rotary embeddings turn entry i of a head with entry i + head / 2.
    half = torch.arange(head // 2)
    in_head = torch.cat([half, HEAD // 2 + half])
    in_heads = torch.cat([number * HEAD + in_head for number in range(num_heads)])
    in_hidden = torch.arange(hidden)

    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            weight = placed(weight, 0, in_heads, wider)
        if kind == "q_proj":
            weight = weight * math.sqrt(HEAD / head)
        if kind == "o_proj":
            weight = placed(weight, 1, in_heads, wider)
        if kind.endswith("norm"):
            weight = placed(weight, 0, in_hidden, wider) * math.sqrt(hidden / wider)
        elif weight.dim() == 2:
            writes_hidden = kind in ("o_proj", "down_proj")
            weight = placed(weight, 0 if writes_hidden else 1, in_hidden, wider)
        weights[name] = weight.contiguous()

    config.hidden_size = wider
    config.rms_norm_eps *= hidden / wider
    config.rope_parameters["rope_theta"] **= HEAD / head
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def placed(old: torch.Tensor, dim: int, places: torch.Tensor, size: int) -> torch.Tensor:
    """Return zeros of `size` along `dim`, with the old entries at `places`."""
    shape = list(old.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=old.dtype).index_copy(dim, places, old)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    widen(options.model, options.out)
    old, new = (AutoModelForCausalLM.from_pretrained(one) for one in (options.model, options.out))
    ids = torch.randint(old.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    largest = (old(ids).logits - new(ids).logits).abs().max()
    print(f"{options.out}: heads of {HEAD}; logits differ by at most {float(largest):.1e}")


if __name__ == "__main__":
    main()
