"""`rlad export verl`: a folder with everything that verl needs to train a run: command, data,
config, README."""

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
    Cluster,
    InFolder,
    num_rollout_batches,
    overrides,
    require_exportable,
    without_equivalent,
)
from rlad.models.loading import load_tokenizer
from rlad.rollouts.prompts import chat_messages, is_plain, prompt_token_ids
from rlad.tasks import Split, Task, make_task

COMMAND = "run.sh"
_IS_BARE = re.compile(r"[A-Za-z_/][\w./:-]*")  # what Hydra reads as text without quotes,
_WORDS = ("null", "true", "false", "nan", "inf")  # except for these


def export_verl(config: RunConfig, folder: Path, cluster: Cluster) -> Path:
    """Write the folder, which must be new or empty, and return the path of its command.

    Raises `UserError` for what verl would train differently, and when a package is missing.
    """
    require_exportable(config, cluster)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; choose another --output.")
    # Everything that can fail comes before the first file, so that no half folder is left.
    tokenizer = load_tokenizer(config.student.model)
    template = None
    if is_plain(tokenizer, config.rollout.prompt_format):
        template = _plain_template(tokenizer)
    num_train = num_rollout_batches(config) * config.rollout.prompts_per_batch
    num_validation = config.evaluation.num_validation_problems
    with closing(make_task(**config.task.model_dump())) as task:
        train = _rows(config, task, "train", num_train)
        validation = _rows(config, task, "validation", num_validation)
    rows = train + validation
    longest = max(_num_prompt_tokens(tokenizer, row, config, template) for row in rows)
    limit = config.rollout.max_prompt_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"a prompt has {longest} tokens, but rollout.max_prompt_tokens is {limit}; raise it."
        )
    keys = overrides(config, cluster, prompt_tokens=longest, chat_template=template)
    notes = without_equivalent(config)
    tables = {"train": _table(train), "validation": _table(validation)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        (folder / f"{name}.parquet").write_bytes(table)
    (folder / CONFIG).write_text(dump_config(_with_absolute_files(config)), encoding="utf-8")
    (folder / COMMAND).write_text(command_text(keys, notes), encoding="utf-8")
    (folder / COMMAND).chmod(0o755)
    (folder / "README.md").write_text(
        _readme(config, cluster, notes, len(train), len(validation)), encoding="utf-8"
    )
    return folder / COMMAND


# --- data -----------------------------------------------------------------------------------------


def _rows(config: RunConfig, task: Task, split: Split, number: int) -> list[dict[str, Any]]:
    """Problems in verl's form, in the order in which the native engine takes them."""
    seed = 0
    if split == "train":
        seed = config.seed
    else:
        number = min(number, task.num_problems(split) or number)
    rows = []
    for index in range(number):
        problem = task.problem(split, index, seed=seed)
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


def _table(rows: list[dict[str, Any]]) -> bytes:
    """A Parquet file of these rows."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            "verl reads Parquet files, for which pyarrow is needed: pip install 'rlad[datasets]'."
        ) from None
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def _with_absolute_files(config: RunConfig) -> RunConfig:
    """verl's workers run in folders of their own: files that the task names must be found from
    anywhere."""
    task = config.task
    if tasks := getattr(task, "tasks", None):
        changed = {"tasks": {name: _absolute(one) for name, one in tasks.items()}}
        return config.model_copy(update={"task": task.model_copy(update=changed)})
    return config.model_copy(update={"task": _absolute(task)})


def _absolute(task: Any) -> Any:
    if not isinstance(task, JsonlConfig):
        return task
    # A name that is no file here is one of the Hugging Face Hub.
    paths = {name: getattr(task, name) for name in ("path", "validation_path", "test_path")}
    files = {k: Path(path) for k, path in paths.items() if path and Path(path).exists()}
    return task.model_copy(update={name: str(file.resolve()) for name, file in files.items()})


# --- prompts --------------------------------------------------------------------------------------


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """verl knows chat prompts alone: a template that writes the prompt as it is, after the
    tokenizer's first token."""
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
    """Tokens of a prompt. `UserError` when verl would give the student other tokens than rlad."""
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
    return len(ours)


# --- command and README ---------------------------------------------------------------------------


def command_text(keys: dict[str, Any], notes: list[str]) -> str:
    """The Bash script; further overrides may follow its name, and win."""
    lines = [f"  {_shell(key, value)}" for key, value in keys.items()]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# verl's command for this run, written by `rlad export verl`; needs verl 0.9 with "
            "vLLM, and rlad, on every node.",
            "# Further overrides of verl's settings may follow the script's name, and win. PYTHON "
            "names the interpreter.",
            "#",
            "# What verl does differently, or not at all:",
            *(f"# - {note}" for note in notes),
            "set -euo pipefail",
            'HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
            '"${PYTHON:-python}" -m verl.trainer.main_ppo \\',
            " \\\n".join([*lines, '  "$@"']),
            "",
        ]
    )


def _shell(key: str, value: Any) -> str:
    """One word of the shell that Hydra reads as `key=value`."""
    if isinstance(value, InFolder):
        return f"{key}=\"'${{HERE}}/{value.name}'\""
    return shlex.quote(f"{key}={_hydra(value)}")


def _hydra(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value)
        case str() if _IS_BARE.fullmatch(value) and value.lower() not in _WORDS:
            return value
        case str():
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            return f"'{escaped}'"
        case list():
            return f"[{','.join(map(_hydra, value))}]"
        case _:
            return repr(value)


def _readme(
    config: RunConfig, cluster: Cluster, notes: list[str], num_train: int, num_validation: int
) -> str:
    where = f"{cluster.gpus_per_node * cluster.nodes} GPUs for the student"
    if config.needs_teacher:
        where += f", {cluster.teacher_gpus_per_node * cluster.teacher_nodes} for the teacher"
    told = "\n".join(f"- {note}" for note in notes)
    return f"""# {config.objective.type} on verl

`bash {COMMAND}` trains on {where}. It needs verl 0.9 with vLLM, and rlad, in the environment of
every node, and this folder at the same path on each of them. `bash {COMMAND} --cfg job` prints
verl's whole config and starts nothing.

| file | what it is |
| --- | --- |
| `{COMMAND}` | the command, every setting that is not verl's default |
| `{CONFIG}` | the run as rlad reads it; the reward function rebuilds the task from it |
| `train.parquet` | {num_train} problems in the order of training |
| `validation.parquet` | {num_validation} problems |

A verifier of your own (`import.path:function`) must be importable on every node.
Before the first run: `rlad check {CONFIG} --engine verl`, in verl's environment.

What verl does differently, or not at all:

{told}
"""
