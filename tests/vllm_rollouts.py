"""A short run of `RLADTrainer` whose rollouts vLLM samples on the CPU, in its own process. A
program for vLLM's environment:

PYTHON tests/vllm_rollouts.py FOLDER SETTINGS

SETTINGS is JSON of more arguments of RLADConfig; FOLDER/found.json is written.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# Before vLLM is imported: its engine in this very process, where TRL reaches its weights.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import vllm._custom_ops

from tiny_models import tiny_model, tiny_tokenizer
from trl_runs import first_inputs, loss_and_gradient, make_trainer, nearby, rows_of, steps_of


def main(folder: Path, settings: dict[str, Any]) -> None:
    # On the CPU vLLM packs weights for oneDNN and throws the plain ones away, so that TRL could not
    # load new ones.
    vllm._custom_ops._supports_onednn = False
    # Its attention on the CPU wants heads of 32 numbers or more.
    model = tiny_model(hidden_size=128, head_dim=32)
    model.generation_config.eos_token_id = list(range(1, 10))
    model.save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    vllm_settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
    trainer = make_trainer(
        folder,
        model=str(folder / "student"),
        trainer={"teacher": nearby(model)},
        **vllm_settings | settings,
    )
    steps = steps_of(trainer)
    inputs = first_inputs(trainer)
    found = {
        "logs": steps.logs,
        "rows": [row for part in inputs for row in rows_of(trainer, part)],
        "advantages": [advantage for part in inputs for advantage in part["advantages"].tolist()],
        "loss": loss_and_gradient(trainer, inputs)[0],
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
