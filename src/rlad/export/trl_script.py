"""`rlad export trl`: a run as a Python script with `RLADTrainer`, which needs no command line and no TOML."""

import json
import textwrap
import warnings
from contextlib import closing
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rlad.config.file import changed_settings, parse_config
from rlad.config.run import RolloutConfig, RunConfig
from rlad.config.teacher import with_those_inside
from rlad.engines.trl.arguments import loop_arguments, objective_arguments
from rlad.engines.trl.config import RLADConfig
from rlad.engines.trl.teacher_data import sequences_per_step
from rlad.engines.trl_options import DECIDED, require_free
from rlad.models.loading import context_tokens, load_model_config, load_tokenizer
from rlad.rollouts.prompts import is_plain, longest_prompt
from rlad.tasks import make_task
from rlad.tasks.probe import require_working_verifier

_LINE = 100  # characters up to which a dictionary stays on one line


class Code(str):
    """An expression of the script, in place of a value."""


_IN_SCRIPT = {
    "per_device_train_batch_size": Code("rows"),
    "gradient_accumulation_steps": Code("per_process // rows"),
    "max_completion_length": Code("MAX_COMPLETION_TOKENS"),
    "temperature": Code("TEMPERATURE"),
    "use_cpu": Code("on_cpu"),
    "dataloader_pin_memory": Code("not on_cpu"),
}
"""Arguments that depend on where the script runs, or that its teacher needs too."""
_PROMPTS = ("prompt_format", "system_prompt", "chat_template_kwargs")
"""settings of [rollout] that a teacher with a prompt of its own goes by"""


def export_trl(config: RunConfig) -> str:
    """The script. `ValueError` with one sentence for what TRL cannot train."""
    config = _for_trl(config)
    _require_no_adapter(config)
    tokenizer = load_tokenizer(config.student.model)
    with closing(make_task(**config.task.model_dump())) as task:
        require_working_verifier(task)
        context = context_tokens(load_model_config(config.student.model))
        longest = longest_prompt(config, task, tokenizer, context) + config.rollout.max_completion_tokens
    arguments = _arguments(config, longest)
    loop, rollout = config.optimization, config.rollout
    template = _environment().get_template("trl_script.py.j2")
    return template.render(
        summary=f"{config.objective.type} on {config.task.type}",
        notes=[line for note in otherwise(config) for line in textwrap.wrap(f"- {note}", 120, subsequent_indent="  ")],
        on_cpu=None if config.student.device == "auto" else config.student.device == "cpu",
        output=arguments.pop("output_dir"),
        seed=config.seed,
        student={"model": config.student.model, "dtype": config.student.dtype},
        task=_plain(config.task),
        teacher=_plain(config.teacher) if config.needs_teacher else None,
        num_prompts=-(-loop.num_steps // loop.steps_per_rollout_batch) * rollout.prompts_per_batch,
        group_size=rollout.group_size,
        completions_per_step=sequences_per_step(config),
        max_completion_tokens=rollout.max_completion_tokens,
        temperature=rollout.temperature,
        longest=longest,
        tokens_per_batch=loop.tokens_per_batch,
        arguments={"output_dir": Code("OUTPUT")} | arguments,
        system_prompt=rollout.system_prompt,
        prompts={name: value for name in _PROMPTS if (value := getattr(rollout, name))},
        is_chat=not is_plain(tokenizer, rollout.prompt_format),
    )


def _for_trl(config: RunConfig) -> RunConfig:
    """The same run with engine.type = "trl", which refuses what TRL has no place for."""
    if config.student.lora:
        raise ValueError(
            "[student.lora] is not exported to a script; pass peft_config to an RLADTrainer of yours, or use `rlad train`."
        )
    if config.student.end_tokens:
        raise ValueError(
            "student.end_tokens is not exported to a script; write them into generation_config.json of the student's folder "
            "(eos_token_id), or use `rlad train`."
        )
    if config.splits_teacher:
        raise ValueError(
            "engine.trl.teacher_is_sharded is not exported to a script; leave it out, and there pass teacher=NAME and "
            "teacher_is_sharded=True."
        )
    return parse_config(config.model_dump() | {"engine": {"type": "trl", "trl": config.engine.trl}})


def _require_no_adapter(config: RunConfig) -> None:
    if config.needs_teacher and any(one.type == "adapter" for one in with_those_inside(config.teacher)):
        raise ValueError(
            "a teacher of type 'adapter' stands on the base model of a student with [student.lora], which is not exported; "
            "use type = 'local'."
        )


def _arguments(config: RunConfig, longest: int) -> dict[str, Any]:
    """Those of `RLADConfig`, values or expressions. `ValueError` for what it refuses."""
    loop, more = config.optimization, config.engine.trl
    own = objective_arguments(config)
    require_free(more, set(own) | DECIDED)
    arguments = {
        "output_dir": f"{config.directory}-trl",
        **own,
        "objective": {"type": config.objective.type} | own["objective"],
        "top_p": 1.0,
        "top_k": 0,
        **loop_arguments(config, longest=longest),
        "optim": "adamw_torch",
        "adam_beta1": loop.betas[0],
        "adam_beta2": loop.betas[1],
        "weight_decay": loop.weight_decay,
        "save_strategy": "steps",
        "save_steps": config.evaluation.every_steps,
        "save_total_limit": 2,
        "report_to": "none",
        **({"chat_template_kwargs": config.rollout.chat_template_kwargs} if config.rollout.chat_template_kwargs else {}),
        **more,
    }
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL itself sets what newer versions of transformers rename
        RLADConfig(**arguments | {"output_dir": folder, "use_cpu": True, "bf16": False})
    return arguments | _IN_SCRIPT


def otherwise(config: RunConfig) -> list[str]:
    """What the script does otherwise than the run by rlad's own engine, or not at all: one sentence each."""
    loop, rollout = config.optimization, config.rollout
    every = config.evaluation.every_steps
    changed = changed_settings(config)
    notes = [
        "Sampled tokens are TRL's (transformers' generate; vLLM with use_vllm=True): the same seed gives other completions.",
        "An answer in which the token limit cuts a completion off is judged as it stands; rlad takes it for none.",
        f"Nothing is validated or tested: `rlad evaluate OUTPUT/checkpoint-{every} --task {config.task.type}` does it (the "
        "task's other settings follow as KEY=VALUE). OUTPUT is no run directory of rlad, but a folder of TRL's.",
    ]
    if loop.weight_decay:
        notes.append("transformers does not decay the weights of norms and biases, rlad decays all.")
    if loop.steps_per_rollout_batch > 1:
        notes.append("TRL chooses which completions of a rollout batch share an optimiser step.")
    for key in ("max_seconds", "max_teacher_tokens", "max_skipped_steps"):
        if f"optimization.{key}" in changed:
            notes.append(f"optimization.{key} = {getattr(loop, key)} is not carried over: TRL has no such limit.")
    if rollout.max_batch_rows < sequences_per_step(config) or rollout.max_batch_rows != RolloutConfig().max_batch_rows:
        notes.append(f"rollout.max_batch_rows = {rollout.max_batch_rows} is not carried over: TRL decodes all rows at once.")
    if rollout.max_prompt_tokens is not None:
        notes.append(f"rollout.max_prompt_tokens = {rollout.max_prompt_tokens} was checked at the export, not at each prompt.")
    if config.student.device not in ("auto", "cpu"):
        notes.append(f"student.device = {config.student.device!r} is not carried over: each process takes a GPU of its own.")
    return notes


# --- Python text ------------------------------------------------------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rlad.export", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    environment.filters["literal"] = literal
    return environment


def _plain(section: Any) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_none=True)


def literal(value: Any, depth: int = 0) -> str:
    """Python text of a value; a dictionary that is too long for one line has a line for each key, `depth` levels in."""
    match value:
        case Code():
            return str(value)
        case str():
            return json.dumps(value, ensure_ascii=False)
        case dict():
            items = [f"{literal(key)}: {literal(one, depth + 1)}" for key, one in value.items()]
            line = f"{{{', '.join(items)}}}"
            if len(line) <= _LINE and "\n" not in line:
                return line
            indent = "    " * (depth + 1)
            return "{\n" + "".join(f"{indent}{item},\n" for item in items) + "    " * depth + "}"
        case list() | tuple():
            return f"[{', '.join(literal(one, depth) for one in value)}]"
        case _:
            return repr(value)
