"""`rlad serve-teacher`: vLLM if it is installed, otherwise rlad's own small server."""

import importlib.util
import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from rlad.errors import UserError, require_package
from rlad.models.files import located, require_weights
from rlad.models.loading import load_language_model, pick_device
from rlad.models.without_weights import load_model_config
from rlad.replicas import read_key

KEY_VARIABLE = "RLAD_TEACHER_API_KEY"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of the command. None means the engine's own default."""

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
    """Serve until interrupted. Raises `UserError` if the server cannot start."""
    engine = options.engine
    if engine == "auto":
        engine = "rlad" if importlib.util.find_spec("vllm") is None else "vllm"
    secret = read_key(KEY_VARIABLE)
    key = secret.get_secret_value() if secret else None
    require_servable(options, engine, key)
    load_model_config(options.model)
    require_weights(options.model)
    listening = listen(options.host, options.port)
    port = listening.getsockname()[1]
    section = teacher_section(options, port)
    if engine == "rlad":
        run_own_server(options, key, listening, section)
    else:
        listening.close()
        click.echo(
            "vLLM is starting; it is ready when GET /health responds. In your config:\n" + section
        )
        start_vllm(options, port, key)


def require_servable(options: ServeOptions, engine: str, key: str | None) -> None:
    """Raise `UserError` if the engine is not installed, or if other machines could reach the server
    without a key."""
    is_local = options.host in ("127.0.0.1", "::1", "localhost")
    problem = ""
    if engine == "rlad":
        for package in ("fastapi", "uvicorn"):
            require_package(package, "rlad's own teacher server", extra="serve")
    elif importlib.util.find_spec("vllm") is None:
        problem = (
            "vllm is not installed in this environment; install it with rlad into a separate one, "
            "or use --engine rlad."
        )
    elif options.device != "auto":
        problem = "vLLM has no --device; leave it out, or use --engine rlad."
    if not (problem or key or options.without_key or is_local):
        problem = (
            f"host {options.host!r} can be reached from other machines: set the environment "
            f"variable {KEY_VARIABLE} to a key that clients must send, or allow access without "
            "one by --without-key."
        )
    if problem:
        raise UserError(problem)


def listen(host: str, port: int) -> socket.socket:
    """Listen on the port before the model is loaded, to reserve it. Port 0 is any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on port {port} of {host!r} ({error.strerror}); change --host or --port."
        ) from None


def teacher_section(options: ServeOptions, port: int) -> str:
    """Write the config section of a run that uses this server."""
    # 0.0.0.0 means all addresses of this machine. Other machines reach it by its name.
    host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return (
        f'[teacher]\ntype = "served"\nurls = ["http://{address}/v1"]\n'
        f"model = {json.dumps(options.name, ensure_ascii=False)}"
    )


def run_own_server(
    options: ServeOptions, key: str | None, listening: socket.socket, section: str
) -> None:
    """Load the model, print the config section, and serve."""
    import uvicorn

    from rlad.serving.app import UVICORN_SETTINGS, TeacherServer

    language_model = load_language_model(options.model, dtype=options.dtype, device=options.device)
    tokens_per_batch = options.tokens_per_batch or 16_384
    teacher = TeacherServer(
        language_model,
        served_name=options.name,
        max_context_tokens=options.max_context_tokens
        or language_model.context_tokens
        or tokens_per_batch,
        tokens_per_batch=tokens_per_batch,
        api_key=key,
    )
    server = uvicorn.Server(uvicorn.Config(teacher.app(), **UVICORN_SETTINGS))
    # The socket listens already. Requests that arrive before the server starts wait a moment.
    click.echo(f"ready. In your config:\n{section}")
    server.run(sockets=[listening])


def start_vllm(options: ServeOptions, port: int, key: str | None) -> NoReturn:
    """Replace this process by vLLM, which then receives the signals and sets the exit code.

    Log-probs are raw, the model's generation config is ignored, no usage statistics are sent, and
    the key is not part of the command line.
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
        "--max-num-batched-tokens": options.tokens_per_batch,
        "--max-model-len": options.max_context_tokens,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [str(part) for flag in flags.items() if flag[1] is not None for part in flag]
    command.append("--disable-uvicorn-access-log")
    # The route that scores a completion without its prompt. Only newer versions have it.
    vllm = importlib.util.find_spec("vllm")
    if vllm and vllm.origin and (Path(vllm.origin).parent / "entrypoints/scale_out").is_dir():
        command.append("--enable-scale-out")
    # Every user of a machine can read command lines, so the key is in the environment.
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if key is not None:
        environment["VLLM_API_KEY"] = key
    # A server on the CPU is for experiments. It starts sooner without compilation, and needs little
    # memory for its cache.
    if pick_device("auto").type == "cpu":
        command.append("--enforce-eager")
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.execve(sys.executable, command, environment)
