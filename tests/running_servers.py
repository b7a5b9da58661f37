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

    server: Any
    """rlad's own, in this process"""

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

    def completion(self, **body: Any) -> dict[str, Any]:
        """The choice of an answer that must be one."""
        status, answer = self.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]

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
def server_thread(language_model: Any, **settings: Any) -> Iterator[Client]:
    """rlad's own server, with the model and the settings that are given."""
    import uvicorn

    from rlad.serving.app import UVICORN_SETTINGS, TeacherServer

    defaults = {"served_name": "tiny", "max_context_tokens": 64, "tokens_per_batch": 512}
    client = Client(free_port(), settings.get("api_key"))
    client.server = TeacherServer(language_model, **defaults | settings)
    config = uvicorn.Config(client.server.app(), port=client.port, **UVICORN_SETTINGS)
    server = uvicorn.Server(config)
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
