"""The README of a run directory: a model card as the Hugging Face hub reads it."""

from rlad.config.run import RunConfig
from rlad.runs.directory import RunDirectory
from rlad.runs.statistics import Estimate


def model_card(config: RunConfig, run: RunDirectory, before: Estimate, after: Estimate) -> str:
    """Write Markdown with the hub's metadata, the figures, and how to load and repeat it."""
    teacher = f"teacher `{config.teacher.title}`" if config.teacher else "no teacher"
    last = run.checkpoints()[-1][1].name
    best = run.checkpoints_by_validation()[0][1].name
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
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "checkpoints/{last}"  # the best on the validation split: {best}
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

`config.toml` repeats the run (`rlad train config.toml run_dir=...`); `run.json` holds the versions
it was made with.
"""
