"""Tiny random models of several families, a tokenizer for them, and a recorder of the largest
tensor."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlad.models.loading import LanguageModel, remove_dropout

VOCABULARY = 64
PAD, EOS, SECOND_EOS = 0, 1, 2

_ATTENTION = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_ROPE = {**_ATTENTION, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
}


def tiny_model(family: str = "llama", *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model whose distributions are neither flat nor peaked; `settings` override its
    config."""
    config = CONFIG_MAPPING[family](
        **{
            "vocab_size": VOCABULARY,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "tie_word_embeddings": False,
            **_SIZES.get(family, _ROPE),
            **settings,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Large weights: every token depends on those before it, so a mistake in mask or
                # position shows.
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    remove_dropout(model)
    return model.eval()


def tiny_language_model(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    eos_token_ids: tuple[int, ...] = (EOS,),
    **settings: Any,
) -> LanguageModel:
    model = tiny_model(family, seed=seed, **settings).to(dtype)
    return LanguageModel(f"tiny-{family}", model, tiny_tokenizer(), eos_token_ids, PAD, dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w3` to `w63`, and the special tokens `<pad>`, `<eos>`, `<eos2>`."""
    words = ["<pad>", "<eos>", "<eos2>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def random_tokens(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """One list of ordinary tokens for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes, backward
    included.

    Views, what is written in place, and what stood in memory before are not made; of sparse tensors
    the stored values count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            _place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        made = [
            leaf
            for leaf in tree_leaves(out)
            if isinstance(leaf, torch.Tensor) and _place(leaf) not in before
        ]
        self.num_elements = max([self.num_elements, *(_stored(leaf).numel() for leaf in made)])
        return out


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._values() if tensor.is_sparse else tensor


def _place(tensor: torch.Tensor) -> int:
    return _stored(tensor).untyped_storage().data_ptr()
