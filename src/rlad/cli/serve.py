"""`rlad serve-teacher`: vLLM where it is installed, else our own small server."""

import importlib.util
import ipaddress
import json
import os
import socket
import sys
from dataclasses import dataclass
from typing import NoReturn

import click

from rlad.errors import UserError
from rlad.models.files import located, require_weights
from rlad.models.loading import load_language_model, load_model_config, pick_device
from rlad.teachers.served.client import read_key

KEY_VARIABLE = "RLAD_TEACHER_API_KEY"
DEFAULT_TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of the command; None where the engine has its own default."""

    model: str
    engine: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "float32"
    device: str = "auto"
    tokens_per_batch: int | None = None
    max_context_tokens: int | None = None
    served_name: str | None = None
    without_key: bool = False

    @property
    def name(self) -> str:
        return self.served_name or self.model


def serve_teacher(options: ServeOptions) -> None:
    """Serve until interrupted. `UserError` with one sentence when the server cannot start."""
    engine = choose_engine(options)
    load_model_config(options.model)
    require_weights(options.model)
    secret = read_key(KEY_VARIABLE)
    key = secret.get_secret_value() if secret else None
    require_key_beyond_this_machine(options, key)
    listening = listen(options.host, options.port)
    port = listening.getsockname()[1]
    if engine == "rlad":
        run_own_server(options, key, listening)
        return
    listening.close()
    click.echo(
        "vLLM is starting; it is ready when GET /health is answered. In your config:\n"
        + teacher_section(options, port)
    )
    sys.stdout.flush()
    start_vllm(options, port, key)


def choose_engine(options: ServeOptions) -> str:
    """Return `vllm` or `rlad`. `UserError` when it is not installed."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    engine = options.engine
    if engine == "auto":
        engine = "vllm" if has_vllm else "rlad"
    problem = ""
    if engine == "vllm" and not has_vllm:
        problem = (
            "vllm is not installed in this environment; install it with rlad into one of its own, "
            "or take --engine rlad."
        )
    elif engine == "vllm" and options.device != "auto":
        problem = "vLLM has no --device; leave it out, or take --engine rlad."
    elif engine == "rlad" and not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
        problem = (
            "rlad's own teacher server needs fastapi and uvicorn; install them with `pip install "
            "'rlad[serve]'`, or install vllm beside rlad."
        )
    if problem:
        raise UserError(problem)
    return engine


def require_key_beyond_this_machine(options: ServeOptions, key: str | None) -> None:
    """`UserError` for a server without a key that other machines could reach."""
    try:
        is_local = ipaddress.ip_address(options.host).is_loopback
    except ValueError:  # a name
        is_local = options.host == "localhost"
    if key is None and not options.without_key and not is_local:
        raise UserError(
            f"host {options.host!r} can be reached from other machines: set the environment "
            f"variable {KEY_VARIABLE} to a key that clients must send, or let anyone in with "
            "--without-key."
        )


def listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded, so that nobody else can; port 0 is any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on port {port} of {host!r} ({error.strerror}); change --host or --port."
        ) from None


def teacher_section(options: ServeOptions, port: int) -> str:
    """Write what the config of a run needs to be taught by this server."""
    # 0.0.0.0 means all addresses of this machine: others reach it by its name.
    host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return (
        f'[teacher]\ntype = "served"\nurls = ["http://{address}/v1"]\n'
        f"model = {json.dumps(options.name, ensure_ascii=False)}"
    )


def run_own_server(options: ServeOptions, key: str | None, listening: socket.socket) -> None:
    """Load the model and serve it; say when requests are answered."""
    import uvicorn

    from rlad.serving.app import UVICORN_SETTINGS, TeacherServer

    language_model = load_language_model(options.model, dtype=options.dtype, device=options.device)
    tokens_per_batch = options.tokens_per_batch or DEFAULT_TOKENS_PER_BATCH
    context = options.max_context_tokens or language_model.context_tokens
    teacher = TeacherServer(
        language_model,
        served_name=options.name,
        max_context_tokens=context or tokens_per_batch,
        tokens_per_batch=tokens_per_batch,
        api_key=key,
    )
    section = teacher_section(options, listening.getsockname()[1])

    # An app is started before uvicorn listens, so that it is ready is said by uvicorn's own method.
    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            click.echo(f"ready. In your config:\n{section}")
            sys.stdout.flush()

    Server(uvicorn.Config(teacher.app(), **UVICORN_SETTINGS)).run(sockets=[listening])


def start_vllm(options: ServeOptions, port: int, key: str | None) -> NoReturn:
    """Replace this process by vLLM: signals and exit code are its own.

    Its log-probs are the model's own, sampling settings of the model's makers do not apply, nothing
    is reported to anyone, and the key is where no list of processes shows it.
    """
    flags: dict[str, object] = {
        "--model": located(options.model),
        "--served-model-name": options.name,
        "--host": options.host,
        "--port": port,
        "--dtype": options.dtype,
        "--max-logprobs": 64,
        "--logprobs-mode": "raw_logprobs",
        "--generation-config": "vllm",
    }
    if options.tokens_per_batch is not None:
        flags["--max-num-batched-tokens"] = options.tokens_per_batch
    if options.max_context_tokens is not None:
        flags["--max-model-len"] = options.max_context_tokens
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [str(part) for flag in flags.items() for part in flag]
    command.append("--disable-uvicorn-access-log")
    # The key goes by the environment, as every user of a machine can read command lines.
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if key is not None:
        environment["VLLM_API_KEY"] = key
    # A server on the CPU is for trying things out: it starts sooner without compilation, and needs
    # little memory for its cache.
    if pick_device("auto").type == "cpu":
        command.append("--enforce-eager")
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.execve(sys.executable, command, environment)
