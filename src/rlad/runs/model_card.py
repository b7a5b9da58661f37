"""The README of a run directory: a model card for the Hugging Face hub."""

from pathlib import Path

from rlad.config.run import RunConfig
from rlad.runs.directory import RunDirectory
from rlad.runs.statistics import Estimate

_BY_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "checkpoints/{last}"  # the best on the validation split: {best}
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
_BY_RLAD = """from rlad.models.loading import load_language_model

# The best on the validation split: {best}
loaded = load_language_model("checkpoints/{last}")
model = loaded.model
tokenizer = loaded.tokenizer"""


def model_card(config: RunConfig, run: RunDirectory, before: Estimate, after: Estimate) -> str:
    """Write Markdown with the hub's metadata, the results, and how to load the model and repeat the
    run."""
    teacher = f"teacher `{config.teacher.title}`" if config.teacher else "no teacher"
    last = run.checkpoints()[-1][1].name
    best = run.checkpoints_by_validation()[0][1].name
    # transformers does not know the embedded models, which a LoRA adapter's folder names.
    base = config.student.model
    is_ours = config.student.lora is not None and (base.startswith("embedded/") or "/" not in base)
    loading = _BY_RLAD if is_ours and not Path(base).exists() else _BY_TRANSFORMERS
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rlad, {config.objective.type}, distillation, reinforcement-learning]
---

# {run.path.name}

`{config.student.model}` trained with `{config.objective.type}` on `{config.task.type}`, {teacher},
{config.optimization.num_steps} optimiser steps, seed {config.seed}.

| | pass@1 on the test split (95 % interval over problems) |
| --- | --- |
| before | {before} |
| after | {after} |

![learning curve](curve.png)

```python
{loading.format(last=last, best=best)}
```

`config.toml` repeats the run (`rlad train config.toml run_dir=...`); `run.json` holds the versions
it was made with.
"""
