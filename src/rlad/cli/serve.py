"""`rlad serve-teacher`: vLLM where it is installed, else our own small server."""

import errno
import importlib.util
import ipaddress
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import click

from rlad.errors import UserError
from rlad.models.files import located, require_weights
from rlad.models.loading import context_tokens, load_language_model, load_model_config, pick_device
from rlad.teachers.served.client import read_key

KEY_VARIABLE = "RLAD_TEACHER_API_KEY"
_DEFAULT_MAX_REQUEST_MIB = 16
_DEFAULT_TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of the command; None where the engine's own default holds."""

    model: str
    engine: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "float32"
    device: str = "auto"
    tokens_per_batch: int | None = None
    max_context_tokens: int | None = None
    max_request_mib: int | None = None
    served_name: str | None = None
    without_key: bool = False

    @property
    def name(self) -> str:
        return self.served_name or self.model


def serve_teacher(options: ServeOptions) -> None:
    """Serves until it is interrupted. `UserError` with one sentence when it cannot start."""
    engine = choose_engine(options)
    config = load_model_config(options.model)
    require_weights(options.model)
    context = options.max_context_tokens or context_tokens(config)
    secret = read_key(KEY_VARIABLE)
    key = None if secret is None else secret.get_secret_value()
    require_key_beyond_this_machine(options, key)
    listening = bind(options.host, options.port)
    port = listening.getsockname()[1]
    address = f"http://{_in_url(options.host)}:{port}"
    section = teacher_section(options.name, f"{address}/v1")
    if engine == "vllm":
        listening.close()
        click.echo(
            f"vLLM is starting; it is ready when GET {address}/health answers. In your "
            f"config:\n{section}"
        )
        start_vllm(options, port, key)
    else:
        _run_own_server(options, context, key, listening, f"ready. In your config:\n{section}")


def choose_engine(options: ServeOptions) -> str:
    """`vllm` or `rlad`. `UserError` when the one that is asked for is not installed, or an option
    is not the engine's."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    engine = options.engine if options.engine != "auto" else "vllm" if has_vllm else "rlad"
    if engine == "rlad":
        if missing := [
            name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None
        ]:
            raise UserError(
                f"rlad's own teacher server needs the package {missing[0]}; install it with `pip "
                "install 'rlad[serve]'`, "
                "or install vllm beside rlad."
            )
        return engine
    if not has_vllm:
        raise UserError(
            "vllm is not installed in this environment; install it with rlad into one of its own, "
            "or take --engine rlad."
        )
    if options.device != "auto" or options.max_request_mib is not None:
        raise UserError(
            "vLLM has no --device and no --max-request-mib; leave them out, or take --engine rlad."
        )
    return engine


def require_key_beyond_this_machine(options: ServeOptions, key: str | None) -> None:
    """`UserError` for a server without a key that other machines could reach."""
    if key is None and not options.without_key and not _is_loopback(options.host):
        raise UserError(
            f"host {options.host!r} can be reached from other machines: set the environment "
            f"variable {KEY_VARIABLE} to a key "
            "that clients must send, or let anyone in with --without-key."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port before the model is loaded. `UserError` when that cannot be;
    port 0 is any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # now, or another process could take the port while the model is loaded
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; give another one with --port."
            ) from None
        raise UserError(
            f"cannot listen on port {port} of {host!r} ({error.strerror}); change --host or --port."
        ) from None
    return bound


def _in_url(host: str) -> str:
    """How clients name the host; one that listens everywhere is named by this machine's name."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def teacher_section(name: str, url: str) -> str:
    """What a run's config needs to be taught by this server."""
    return f'[teacher]\ntype = "served"\nurls = ["{url}"]\nmodel = {json.dumps(name, ensure_ascii=False)}'


def vllm_command(options: ServeOptions, port: int, *, is_cpu: bool) -> list[str]:
    """How vLLM is started. Log-probs are the model's own; sampling settings of the model's makers
    do not apply."""
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
    return [*command, "--disable-uvicorn-access-log", *(["--enforce-eager"] if is_cpu else [])]


def vllm_environment(own: Mapping[str, str], key: str | None, *, is_cpu: bool) -> dict[str, str]:
    """Nothing is reported to anyone; the key goes by the environment, where no list of processes
    shows it."""
    environment = dict(own) | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if key is not None:
        environment["VLLM_API_KEY"] = key
    if is_cpu:
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    return environment


def start_vllm(options: ServeOptions, port: int, key: str | None) -> NoReturn:
    """This process becomes vLLM: signals and exit code are its own."""
    is_cpu = pick_device("auto").type == "cpu"
    sys.stdout.flush()
    os.execve(
        sys.executable,
        vllm_command(options, port, is_cpu=is_cpu),
        vllm_environment(os.environ, key, is_cpu=is_cpu),
    )


def _run_own_server(
    options: ServeOptions,
    context: int | None,
    key: str | None,
    listening: socket.socket,
    ready: str,
) -> None:
    import uvicorn

    from rlad.serving.app import ServerSettings, make_app
    from rlad.serving.limits import server_config

    language_model = load_language_model(options.model, dtype=options.dtype, device=options.device)
    tokens_per_batch = options.tokens_per_batch or _DEFAULT_TOKENS_PER_BATCH
    settings = ServerSettings(
        served_name=options.name,
        api_key=key,
        max_request_bytes=(options.max_request_mib or _DEFAULT_MAX_REQUEST_MIB) * 2**20,
        max_context_tokens=context or tokens_per_batch,
        tokens_per_batch=tokens_per_batch,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            click.echo(ready)
            sys.stdout.flush()

    Server(server_config(make_app(language_model, settings))).run(sockets=[listening])
