"""Teacher servers of the tests: rlad's own in a thread of this process, any command as a process,
and requests to them."""

import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Client:
    """Requests to a server on a port of 127.0.0.1."""

    state: Any
    """of rlad's own server in this process"""
    worker: Any

    def __init__(self, port: int, key: str | None = None):
        self.port, self.key = port, key

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of the answer. A `body` that is bytes, or pieces of bytes, goes as it
        is."""
        content = (
            body
            if body is None or isinstance(body, bytes | Iterator)
            else json.dumps(body).encode()
        )
        if self.key is not None:
            headers = {"Authorization": f"Bearer {self.key}"} | headers
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(
                method, path, content, headers, encode_chunked=isinstance(body, Iterator)
            )
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(text) if text else None

    def completions(self, **body: Any) -> list[dict[str, Any]]:
        """The choices of an answer that must be one."""
        status, answer = self.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer["choices"]

    def is_healthy(self) -> bool:
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server_thread(
    language_model: Any, *, uvicorn: Mapping[str, Any] | None = None, **settings: Any
) -> Iterator[Client]:
    """rlad's own server, with the model and the settings that are given, and those of uvicorn."""
    from uvicorn import Server

    from rlad.serving.app import ServerSettings, make_app
    from rlad.serving.limits import server_config

    defaults = {
        "api_key": None,
        "max_request_bytes": 2**20,
        "max_context_tokens": 64,
        "tokens_per_batch": 512,
    }
    app = make_app(
        language_model, ServerSettings(**{"served_name": "tiny", **defaults, **settings})
    )
    client = Client(free_port(), settings.get("api_key"))
    client.state, client.worker = app.state.server, app.state.server.worker
    server = Server(server_config(app, host="127.0.0.1", port=client.port, **(uvicorn or {})))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(client.is_healthy, seconds=30)
        yield client
    finally:
        server.should_exit = True
        thread.join(timeout=30)


@contextmanager
def server_process(
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process of its own, ready; ended by its id with everything that it started."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            return Client(port).is_healthy()

        wait_for(is_ready, seconds)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} seconds in vain"
        time.sleep(0.05)
