"""rlad's teacher server and clients that are slow, silent, gone, wrong or many: others get right
answers, memory comes back."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch

from rlad.models.loading import LanguageModel
from running_servers import Client, server_thread, wait_for
from tiny_models import random_tokens, tiny_language_model

pytest.importorskip("fastapi", reason="needs the optional package fastapi (rlad[serve])")
pytest.importorskip("uvicorn", reason="needs the optional package uvicorn (rlad[serve])")
pytestmark = pytest.mark.serve

PROMPT = random_tokens(12)[0]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model()


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Client]:
    """Whose patience is short."""
    from rlad.serving.limits import ImpatientProtocol

    class Hasty(ImpatientProtocol):
        head_seconds, unread_seconds, max_silent = 0.5, 0.5, 20

    with server_thread(
        model, uvicorn={"http": Hasty, "timeout_keep_alive": 1}, request_seconds=0.5
    ) as client:
        yield client


def expected(model: LanguageModel, prompt: list[int]) -> list[float]:
    with torch.no_grad():
        logprobs = model.model(input_ids=torch.tensor([prompt])).logits[0, :-1].log_softmax(dim=-1)
    return logprobs.gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1).tolist()


def score(server: Client, prompt: list[int]) -> list[float]:
    (choice,) = server.completions(model="tiny", prompt=prompt, prompt_logprobs=0, max_tokens=0)
    return [
        entry[str(token)]["logprob"]
        for token, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    ]


def connect(server: Client, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(sent)
    return connection


def end_of(connection: socket.socket) -> bytes:
    """All that the server says until it hangs up."""
    said = b""
    try:
        while piece := connection.recv(65536):
            said += piece
    except ConnectionError:
        pass
    return said


def request(body: bytes, **headers: str) -> bytes:
    lines = "".join(
        f"{name}: {value}\r\n"
        for name, value in ({"Content-Length": str(len(body))} | headers).items()
    )
    return HEAD + lines.encode() + b"\r\n" + body


@pytest.mark.parametrize("sent", [b"", b"POST", HEAD, HEAD + b"X: " + b"y" * 1000])
def test_a_connection_that_does_not_ask_is_cut(server, sent):
    began = time.monotonic()
    with connect(server, sent) as connection:
        assert end_of(connection) == b""
    assert time.monotonic() - began < 5


def test_a_head_that_drips_is_cut(server, model):
    with connect(server) as connection:
        try:
            for byte in HEAD * 10:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
            pytest.fail("it may drip for ever")
        except ConnectionError:
            pass
    assert score(server, PROMPT) == pytest.approx(expected(model, PROMPT), abs=1e-5)


def test_a_second_head_that_drips_is_cut_too(server):
    with connect(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET")
        assert end_of(connection) == b""


def test_a_body_that_does_not_come_is_refused(server):
    with connect(server, HEAD + b"Content-Length: 1000\r\n\r\n{") as connection:
        said = end_of(connection)
    assert said.startswith(b"HTTP/1.1 408") and b"did not come within 0.5 seconds" in said
    wait_for(lambda: server.state.held_bytes == 0, seconds=5)


def test_an_answer_that_is_not_read_is_cut_and_its_room_given_back(server, model):
    body = json.dumps(
        {"model": "tiny", "prompt": [[3] * 60] * 100, "prompt_logprobs": 20, "max_tokens": 0}
    ).encode()
    connections = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(body))
        connections.append(connection)
    time.sleep(0.3)
    assert score(server, PROMPT) == pytest.approx(expected(model, PROMPT), abs=1e-5)
    wait_for(
        lambda: (
            server.state.room.num_free == server.state.room.size and server.state.held_bytes == 0
        ),
        seconds=60,
    )
    for connection in connections:
        connection.close()


def test_silent_connections_do_not_crowd_out_others(server, model):
    silent = [connect(server) for _ in range(25)]
    assert score(server, PROMPT) == pytest.approx(expected(model, PROMPT), abs=1e-5)
    assert [end_of(connection) for connection in silent[:5]] == [b""] * 5
    for connection in silent:
        connection.close()


def test_many_large_requests_at_once_are_put_off(server):
    """More bytes than the server holds, in requests that are each allowed; what is refused is said
    to come again."""
    part = HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 900_000
    connections = [connect(server, part) for _ in range(8)]
    said = [end_of(connection) for connection in connections]
    statuses = sorted(answer[9:12] for answer in said)
    assert statuses[0] == b"408" and statuses[-1] == b"503" and set(statuses) == {b"408", b"503"}
    assert all(b"retry-after: 1" in answer.lower() for answer in said if b" 503 " in answer[:20])
    wait_for(lambda: server.state.held_bytes == 0, seconds=5)
    assert server.is_healthy()


@pytest.mark.parametrize(
    "sent",
    [
        *(
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x00" * 5000,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ),
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
    ],
)
def test_what_is_no_request_of_http_ends_its_connection_alone(server, model, sent):
    with connect(server) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent)
        assert end_of(connection)[9:12] in (b"", b"400", b"404")
    assert score(server, PROMPT) == pytest.approx(expected(model, PROMPT), abs=1e-5)


def test_a_text_that_is_far_too_long_is_not_even_read(server):
    status, answer = server.ask(
        "POST", "/v1/completions", {"model": "tiny", "prompt": "w3 " * 10_000, "prompt_logprobs": 0}
    )
    assert (
        status == 400
        and "30000 characters is far more than the context of 64 tokens"
        in answer["error"]["message"]
    )


def test_a_mixture_of_clients(server, model):
    """Right and wrong requests from many clients at once: each right one is answered right, each
    wrong one with its status."""
    prompts = random_tokens(*(3 + i % 40 for i in range(60)), seed=4)
    wrong: list[tuple[Any, int]] = [
        (b"{", 400),
        ({"model": "other", "prompt": [3]}, 404),
        ({"model": "tiny", "prompt": [999]}, 400),
        (b" " * (2**20 + 1), 413),
        ({"model": "tiny", "prompt": "\ud800 w3"}, 400),
    ]

    def ask(i: int) -> None:
        if i % 3 == 0:
            body, status = wrong[i // 3 % len(wrong)]
            try:
                assert server.ask("POST", "/v1/completions", body)[0] == status
            except ConnectionError:  # hung up while the rest of what is too large was still coming
                assert status == 413
        elif i % 3 == 1:
            with connect(
                server, request(json.dumps({"model": "tiny", "prompt": prompts[i]}).encode())
            ):
                pass
        else:
            assert score(server, prompts[i]) == pytest.approx(expected(model, prompts[i]), abs=1e-5)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(60)))
    wait_for(lambda: server.state.room.num_free == server.state.room.size, seconds=10)


def test_room_is_given_in_turn_and_never_twice():
    from rlad.serving.limits import Room

    async def scenario() -> list[int]:
        room, order, held = Room(10), list[int](), [0]

        async def use(name: int, size: int) -> None:
            taken = await room.take(size)
            held[0] += taken
            assert held[0] <= 10
            order.append(name)
            await asyncio.sleep(0.01)
            held[0] -= taken
            room.give_back(taken)

        given_up = asyncio.create_task(use(99, 10))
        tasks = [asyncio.create_task(use(i, size)) for i, size in enumerate([6, 25, 1, 1, 9])]
        await asyncio.sleep(0)
        waiting = asyncio.create_task(use(77, 10))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(given_up, *tasks)
        assert room.num_free == 10
        return order

    assert asyncio.run(scenario()) == [99, 0, 1, 2, 3, 4]
