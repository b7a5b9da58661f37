"""Print the memory that `rlad check` estimates for the recipes here, without downloading models.

The models' sizes are those of their published config.json. Weights are on meta tensors.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from rlad.checks.memory import estimate_memory
from rlad.config.file import load_config

# layers, hidden size, intermediate size, attention heads; all have 8 key-value heads of 128 and a
# vocabulary of 151,936.
SIZES = {
    "Qwen/Qwen3-0.6B": (28, 1024, 3072, 16),
    "Qwen/Qwen3-1.7B": (28, 2048, 6144, 16),
    "Qwen/Qwen3-8B-Base": (36, 4096, 12288, 32),
    "Qwen/Qwen3-8B": (36, 4096, 12288, 32),
    "Qwen/Qwen3-32B": (64, 5120, 25600, 64),
}
TIED = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B")
GIB = 1024**3


def write_config(name: str, folder: Path) -> str:
    """Write the config of a model without weights; return its folder."""
    layers, hidden, intermediate, heads = SIZES[name]
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": name in TIED,
        "eos_token_id": 151645,
    }
    target = folder / name.replace("/", "-")
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def main() -> None:
    print(
        "| recipe | student, gradients, AdamW | teacher | rollouts' cache | activations, logits |"
    )
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        for toml in sorted(Path(__file__).parent.glob("*/run.toml")):
            config = load_config(toml)
            assert (
                config.teacher is not None
                and config.teacher.type == "local"
                and config.rollout.max_prompt_tokens
            )
            student, teacher = (
                write_config(model.model, Path(scratch))
                for model in (config.student, config.teacher)
            )
            config = load_config(
                toml, [f"student.model={student}", f"teacher.model={teacher}", "teacher.keep=gpu"]
            )
            needed = estimate_memory(
                config, prompt_tokens=config.rollout.max_prompt_tokens or 0, device="cpu"
            )
            trained = needed.student_weights + needed.gradients_and_optimizer
            parts = (
                trained,
                needed.teacher_weights,
                needed.sampler_cache,
                needed.activations + needed.logits,
            )
            print(
                f"| `{toml.parent.name}` | "
                + " | ".join(f"{part / GIB:.0f} GiB" for part in parts)
                + " |"
            )


if __name__ == "__main__":
    main()
