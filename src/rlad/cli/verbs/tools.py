"""Commands that serve, export, list and download."""

import json
from pathlib import Path
from typing import Any

import click

from rlad.cli.arguments import AT_LEAST_1, CONFIG_ARGUMENTS, JSON_OPTION, NEW_FOLDER, load


@click.command(name="serve-teacher")
@click.argument("model")
@click.option("--engine", type=click.Choice(["auto", "vllm", "rlad"]), default="auto")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--device", default="auto", help="Not for vLLM.")
@click.option(
    "--tokens-per-batch",
    type=AT_LEAST_1,
    help="Limit of tokens in one forward pass; 16384 without vLLM.",
)
@click.option(
    "--max-context-tokens",
    type=click.IntRange(min=2),
    help="Limit of prompt and completion; by default the model's.",
)
@click.option(
    "--served-name", metavar="NAME", help="Name of the model for clients; by default MODEL."
)
@click.option("--without-key", is_flag=True, help="Allow other machines without an API key.")
def serve_teacher(**options: Any) -> None:
    """Serve a teacher to runs on this or other machines.

    MODEL is a folder, a Hugging Face name or embedded/teacher. The engine is vLLM if it is
    installed, otherwise rlad's own small server (rlad[serve]). Copy the section that is printed at
    the start into the config of a run.

    If the environment variable RLAD_TEACHER_API_KEY is set, clients must send this key. rlad's own
    server is for runs that trust each other; use vLLM for a public server.
    """
    from rlad.cli.serve import ServeOptions
    from rlad.cli.serve import serve_teacher as serve

    serve(ServeOptions(**options))


@click.group()
def export() -> None:
    """Export a trained model, or a run for verl."""


@export.command(name="model")
@click.argument("run")
@click.option("--checkpoint", default="best", metavar="best|last|STEP", help="best: by validation.")
@click.option("--output", type=NEW_FOLDER, help="New folder; default: RUN-model.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--push", metavar="USER/NAME", help="Also push it to the hub, with its card.")
@click.option("--private", is_flag=True, help="Make a new repository on the hub private.")
def export_model(run: str, push: str | None, private: bool, **how: Any) -> None:
    """Write the model of run directory RUN as a plain Hugging Face folder.

    A LoRA adapter is merged into its base model.
    """
    from rlad.export.hub import push_model, require_push
    from rlad.runs.directory import RunDirectory

    if push is not None:
        require_push(push)
    from rlad.export.model import export_model as write

    folder = write(run, **how)
    click.echo(f"model  {folder}")
    if push is not None:
        address = push_model(RunDirectory(Path(run)), folder, push, private=private)
        click.echo(f"pushed  {address}")


@export.command(name="verl")
@CONFIG_ARGUMENTS
@click.option("--output", type=NEW_FOLDER, help="New folder; default: RUN_DIR-verl.")
@click.option("--gpus-per-node", default=8, type=AT_LEAST_1, help="For the student.")
@click.option("--nodes", default=1, type=AT_LEAST_1, help="For the student.")
@click.option("--teacher-gpus-per-node", default=8, type=AT_LEAST_1)
@click.option("--teacher-nodes", default=1, type=AT_LEAST_1)
def export_verl(arguments: tuple[str, ...], output: Path | None, **cluster: int) -> None:
    """Write a run's command, data and reward function for verl (clusters on Ray).

    verl need not be installed. Arguments are those of `rlad train`; comments in the command list
    what verl does differently.
    """
    config = load(arguments)
    from rlad.export.verl import export_verl as write
    from rlad.export.verl_command import Cluster

    folder = output or config.directory.with_name(f"{config.directory.name}-verl")
    click.echo(f"command  {write(config, folder, Cluster(**cluster))}")


@click.command(name="list")
@click.argument("what", type=click.Choice(["objectives", "tasks", "teachers", "settings"]))
@click.argument("name", required=False)
@JSON_OPTION
def list_(what: str, name: str | None, as_json: bool) -> None:
    """List objectives, tasks, teachers and settings.

    With NAME: its formula or meaning, and all settings with their defaults, in config syntax.
    """
    from rlad.config.catalogue import describe, names

    if name is None:
        rows = names(what)
        plain = "\n".join(f"{key:<20} {text}" for key, text in rows.items())
        click.echo(json.dumps(rows) if as_json else plain)
    else:
        text = describe(what, name)
        click.echo(json.dumps({"name": name, "text": text}) if as_json else text)


@click.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List models, or download and convert one."""
    if context.invoked_subcommand is None:
        from rlad.cli.models import print_models

        print_models()


@models.command()
@click.argument("name")
def prepare(name: str) -> None:
    """Download and convert model NAME, so that runs need no connection."""
    from rlad.cli.models import prepare as prepare_model

    prepare_model(name)
