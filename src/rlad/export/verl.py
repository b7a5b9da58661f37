"""`rlad export verl`: write a folder with everything that verl needs to train a run: command, data,
config."""

import importlib.util
import json
import re
import shlex
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlad.config.file import CONFIG, dump_config
from rlad.config.run import RunConfig
from rlad.config.task import JsonlConfig
from rlad.errors import UserError
from rlad.export.verl_command import (
    HERE,
    Cluster,
    overrides,
    require_exportable,
    without_equivalent,
)
from rlad.models.vision import sees
from rlad.models.without_weights import load_model_config, load_tokenizer
from rlad.rollouts.prompts import (
    chat_messages,
    check_prompt_length,
    is_plain,
    prompt_token_ids,
)
from rlad.tasks import Split, Task, make_task

COMMAND = "run.sh"
_SCRIPT = """#!/usr/bin/env bash
# verl's command for this run, written by `rlad export verl`. It needs verl 0.9 with vLLM, and rlad,
# in the environment of every node, and this folder at the same path on each of them. Further
# overrides of verl's settings may follow the script's name, and win. PYTHON names the interpreter.
#
# What verl does differently, or not at all:
{notes}
set -euo pipefail
HERE="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
"${{PYTHON:-python}}" -m verl.trainer.main_ppo \\
{overrides} \\
  "$@"
"""


def export_verl(config: RunConfig, folder: Path, cluster: Cluster) -> Path:
    """Write the folder, which must be new or empty, and return the path of its command.

    Raises `UserError` for what verl would train differently, and when a package is missing.
    """
    # Everything that can fail comes before the first file, so that no half folder is left.
    require_exportable(config, cluster)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; choose another --output.")
    if sees(load_model_config(config.student.model)):
        raise UserError(
            f"student.model = {config.student.model!r} reads pictures, and the verl route is for "
            "models of texts alone; train on the native engine instead."
        )
    tokenizer = load_tokenizer(config.student.model)
    template = None
    if is_plain(tokenizer, config.rollout.prompt_format):
        template = _plain_template(tokenizer)
    num_train = config.optimization.num_rollout_batches * config.rollout.prompts_per_batch
    num_validation = config.evaluation.num_validation_problems
    with closing(make_task(**config.task.model_dump())) as task:
        train = _rows(config, task, "train", num_train)
        validation = _rows(config, task, "validation", num_validation)
    rows = train + validation
    longest = max(_num_prompt_tokens(tokenizer, row, config, template) for row in rows)
    keys = overrides(config, cluster, prompt_tokens=longest, chat_template=template)
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            "verl reads Parquet files, for which pyarrow is needed: pip install 'rlad[datasets]'."
        )

    folder.mkdir(parents=True, exist_ok=True)
    _write_table(train, folder / "train.parquet")
    _write_table(validation, folder / "validation.parquet")
    (folder / CONFIG).write_text(dump_config(_with_absolute_files(config)), encoding="utf-8")
    script = _SCRIPT.format(
        notes="\n".join(f"# - {note}" for note in without_equivalent(config)),
        overrides=" \\\n".join(f"  {_shell(key, value)}" for key, value in sorted(keys.items())),
    )
    (folder / COMMAND).write_text(script, encoding="utf-8")
    (folder / COMMAND).chmod(0o755)
    return folder / COMMAND


def _shell(key: str, value: Any) -> str:
    """Return one shell word that Hydra reads as `key=value`: JSON, except for the escapes of
    text."""
    if not isinstance(value, str):
        return shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")
    if value.startswith(HERE):
        return f"{key}=\"'{value}'\""
    # To Hydra a backslash is one character, except before a quote.
    escaped = re.sub(r'\\+(?="|$)', r"\g<0>\g<0>", value).replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


# --- data -----------------------------------------------------------------------------------------


def _rows(config: RunConfig, task: Task, split: Split, number: int) -> list[dict[str, Any]]:
    """Return problems in verl's form, in the order of the native engine."""
    seed = 0
    if split == "train":
        seed = config.seed
    else:
        number = min(number, task.num_problems(split) or number)
    rows = []
    for index in range(number):
        problem = task.problem(split, index, seed=seed)
        if problem.images:
            raise UserError(
                "the task's problems have pictures, and the verl route trains on texts; train on "
                "the native engine instead."
            )
        row = {
            "data_source": problem.task or task.name,
            "prompt": chat_messages(problem.asked, config.rollout.system_prompt),
            "ability": problem.difficulty,
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            # By these the reward function finds the problem again.
            "extra_info": {"split": split, "index": index, "seed": seed},
        }
        rows.append(row)
    return rows


def _write_table(rows: list[dict[str, Any]], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file)


def _with_absolute_files(config: RunConfig) -> RunConfig:
    """Make the task's file names absolute, since verl's workers run in other folders."""
    task = config.task
    if tasks := getattr(task, "tasks", None):
        changed = {"tasks": {name: _absolute(one) for name, one in tasks.items()}}
        return config.model_copy(update={"task": task.model_copy(update=changed)})
    return config.model_copy(update={"task": _absolute(task)})


def _absolute(task: Any) -> Any:
    if not isinstance(task, JsonlConfig):
        return task
    # A name that is not a file here is a name on the Hugging Face hub.
    paths = {name: getattr(task, name) for name in ("path", "validation_path", "test_path")}
    files = {k: Path(path) for k, path in paths.items() if path and Path(path).exists()}
    return task.model_copy(update={name: str(file.resolve()) for name, file in files.items()})


# --- prompts --------------------------------------------------------------------------------------


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a template that writes the prompt unchanged after the tokenizer's first token, since
    verl supports only chat prompts."""
    # Some tokenizers begin every text with a token of their own, which verl's templates must write
    # out.
    bare = tokenizer("1", add_special_tokens=False)["input_ids"]
    full = tokenizer("1", add_special_tokens=True)["input_ids"]
    begins = len(full) > len(bare) and full[0] == tokenizer.bos_token_id
    start = "{{ bos_token }}" if begins else ""
    return start + "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def _num_prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], config: RunConfig, template: str | None
) -> int:
    """Count the tokens of a prompt. Raises `UserError` if verl would give the student other tokens
    than rlad, or if there are too many."""
    messages = row["prompt"]
    variables = config.rollout.chat_template_kwargs
    ours = prompt_token_ids(
        tokenizer, tuple((m["role"], m["content"]) for m in messages), config.rollout
    )
    # verl writes the template's text and then encodes it, which need not give the template's own
    # tokens.
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
    )
    theirs = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    if ours != theirs:
        raise UserError(
            f"verl would turn the prompt {messages[-1]['content'][:60]!r} into other tokens than "
            f"rlad ({theirs[:5]}... instead of {ours[:5]}...); use a tokenizer with a chat "
            "template and rollout.prompt_format = 'chat'."
        )
    check_prompt_length(len(ours), f"a {row['extra_info']['split']} problem", config.rollout, None)
    return len(ours)
