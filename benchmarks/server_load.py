"""rlad's teacher server under load and under attack, from another process on this machine; prints a
table.

    python benchmarks/server_load.py

First many clients that ask as they should, then the same with clients that do not: too large,
malformed, without the key, gone before the answer, silent, dripping, not reading. Every answer with
log-probs is compared with those that the model gives in this process. The exit code is 1 when one
is wrong, when an accepted request is not answered, or when the server is not there any more. Memory
is the server's resident memory, looked at 20 times a second. Everything is bounded in number and
time.
"""

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from os import environ
from tempfile import TemporaryFile
from typing import Any

import psutil

KEY, NAME = "a-key-for-the-load", "it"
TOLERANCE = 1e-4
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
Prompt = list[int]


class Server:
    """`rlad serve-teacher` in a process of its own, and the memory that it held."""

    def __init__(self, model: str):
        command = [
            sys.executable,
            "-m",
            "rlad",
            "serve-teacher",
            model,
            "--engine",
            "rlad",
            "--port",
            "0",
            "--served-name",
            NAME,
        ]
        environment = environ | {"RLAD_TEACHER_API_KEY": KEY}
        self.log = TemporaryFile()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(4)]
        self.port = int(lines[3].partition("127.0.0.1:")[2].partition("/")[0])
        self.peak, self.is_over = 0, threading.Event()
        self._memory = psutil.Process(self.process.pid)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def mib(self) -> float:
        return self._memory.memory_info().rss / 2**20

    def _watch(self) -> None:
        with suppress(psutil.Error):
            while not self.is_over.wait(0.05):
                self.peak = max(self.peak, self._memory.memory_info().rss)

    def ask(self, body: Any, key: str = KEY, path: str = "/v1/completions") -> tuple[int, Any]:
        """Status and JSON; status 0 when the server hung up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(
                "GET" if body is None else "POST", path, content, {"Authorization": f"Bearer {key}"}
            )
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text.startswith(b"{") else None
        except OSError:
            return 0, None
        finally:
            connection.close()

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        connection.sendall(sent)
        return connection

    def close(self) -> None:
        self.is_over.set()
        self.process.terminate()
        self.process.communicate(timeout=60)
        self.num_logged = self.log.tell()


class Load:
    """What clients do, and what came of it: (client, outcome) -> how often."""

    def __init__(self, server: Server, prompts: list[Prompt], expected: list[list[float]]):
        self.server, self.prompts, self.expected = server, prompts, expected
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.worst_error, self.num_wrong, self.seconds = 0.0, 0, list[float]()
        self._lock = threading.Lock()

    def note(self, client: str, outcome: str) -> None:
        with self._lock:
            self.outcomes[client, outcome] += 1

    def right(self, i: int, client: str) -> None:
        """Two prompts in one request."""
        numbers = [i % len(self.prompts), (7 * i + 1) % len(self.prompts)]
        prompts, began = [self.prompts[n] for n in numbers], time.monotonic()
        status, answer = self.server.ask(
            {"model": NAME, "prompt": prompts, "prompt_logprobs": 0, "max_tokens": 1}
        )
        self.note(client, f"{status}")
        if status != 200:
            return
        for n, choice in zip(numbers, answer["choices"], strict=True):
            pairs = zip(
                self.prompts[n][1:], choice["prompt_logprobs"][1:], self.expected[n], strict=True
            )
            error = max(abs(entry[str(token)]["logprob"] - value) for token, entry, value in pairs)
            with self._lock:
                self.worst_error, self.num_wrong = (
                    max(self.worst_error, error),
                    self.num_wrong + (error > TOLERANCE),
                )
        with self._lock:
            self.seconds.append(time.monotonic() - began)

    # --- clients that do not ask as they should -----------------------------------------------------------------------------

    def too_large(self, _: int) -> str:
        return str(self.server.ask(b" " * (17 * 2**20))[0])

    def malformed(self, i: int) -> str:
        return str(
            self.server.ask(
                [b"{", b"[" * 50_000, b"\xff\xfe", b'{"model": "it", "prompt": [1, "a"]}', b"null"][
                    i % 5
                ]
            )[0]
        )

    def wrong_key(self, i: int) -> str:
        return str(
            self.server.ask(
                {"model": NAME, "prompt": [5]}, key=["", "x", KEY[:-1], KEY + "x"][i % 4]
            )[0]
        )

    def not_served(self, i: int) -> str:
        body = [{"model": "x"}, {"prompt": [10**9]}, {"prompt": [5] * 10**5}, {"n": 2}][i % 4]
        return str(self.server.ask({"model": NAME, "prompt": [5]} | body)[0])

    def gone(self, i: int) -> str:
        body = json.dumps(
            {"model": NAME, "prompt": self.prompts[i % len(self.prompts)], "prompt_logprobs": 0}
        ).encode()
        whole = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        self.server.connect(whole[: len(whole) if i % 2 else len(whole) - 9]).close()
        return "left"

    def no_http(self, i: int) -> str:
        with self.server.connect(
            [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 70_000][i % 3]
        ) as connection:
            return said(connection)

    def silent(self, _: int) -> str:
        with self.server.connect() as connection:
            return said(connection)

    def dripping_head(self, _: int) -> str:
        with self.server.connect() as connection, suppress(ConnectionError):
            for i in range(60):
                connection.sendall(HEAD[i : i + 1])
                time.sleep(1)
            return "not cut"
        return "cut"

    def dripping_body(self, _: int) -> str:
        with self.server.connect(
            HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 500_000
        ) as connection:
            return said(connection)

    def unread(self, i: int) -> str:
        """An answer of some ten MB of which nothing is read for a minute."""
        body = {
            "model": NAME,
            "prompt": [self.prompts[i % len(self.prompts)][:100]] * 40,
            "prompt_logprobs": 50,
            "max_tokens": 1,
        }
        content = json.dumps(body).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", self.server.port))
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
            time.sleep(60)
            connection.settimeout(5)
            answer = b""
            with suppress(OSError):
                while piece := connection.recv(2**20):
                    answer += piece
        head, _, content = answer.partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or -1)
        return "sent whole" if len(content) == size else "cut"


def said(connection: socket.socket) -> str:
    """The status with which a connection ends; cut, when it ends without a word."""
    with suppress(ConnectionError):
        answer = connection.recv(100)
        return answer[9:12].decode("ascii", "replace") or "cut"
    return "cut"


ATTACKS = {  # client: (how many, how many at once, what the server may do)
    "too_large": (40, 2, {"413", "0"}),
    "malformed": (1500, 2, {"400"}),
    "wrong_key": (1500, 2, {"401"}),
    "not_served": (800, 2, {"400", "404"}),
    "gone": (1000, 2, {"left"}),
    "no_http": (300, 2, {"400", "cut", "404"}),
    "silent": (400, 100, {"cut"}),
    "dripping_head": (60, 30, {"cut"}),
    "dripping_body": (10, 5, {"408"}),
    "unread": (
        12,
        6,
        {"cut", "sent whole"},
    ),  # whole where it was computed so late that the client read it in time
}


def attack(load: Load, client: str) -> None:
    num_clients, at_once, _ = ATTACKS[client]
    with ThreadPoolExecutor(at_once) as pool:
        for outcome in pool.map(getattr(load, client), range(num_clients)):
            load.note(client, outcome)


def peace(load: Load, num_requests: int, at_once: int, name: str) -> None:
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda i: load.right(i, name), range(num_requests)))


def siege(load: Load, at_once: int) -> None:
    """All attacks side by side, in which anyone may be put off with 503; the others go on asking
    until the last is over."""
    threads = [threading.Thread(target=attack, args=(load, client)) for client in ATTACKS]
    for thread in threads:
        thread.start()

    def ask(first: int) -> None:
        for i in range(first, 10**6, at_once):
            if not any(thread.is_alive() for thread in threads):
                return
            load.right(i, "right, meanwhile")
            time.sleep(0.05)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(ask, range(at_once)))


def expected_logprobs(model: str, num_prompts: int) -> tuple[list[Prompt], list[list[float]]]:
    from rlad.models.loading import load_language_model
    from rlad.scoring.scorer import Scorer

    loaded, draw = load_language_model(model, device="cpu"), random.Random(0)
    prompts = [
        [draw.randrange(loaded.vocabulary) for _ in range(draw.randrange(2, 120))]
        for _ in range(num_prompts)
    ]
    scorer = Scorer(loaded, temperature=1.0, tokens_per_batch=4096)
    return prompts, [
        row.tolist() for row in scorer.score([p[:1] for p in prompts], [p[1:] for p in prompts])
    ]


@contextmanager
def measured(server: Server, name: str, rows: list[str]) -> Iterator[None]:
    before, server.peak, began = server.mib, 0, time.monotonic()
    yield
    seconds, peak = time.monotonic() - began, server.peak / 2**20
    time.sleep(2)
    rows.append(f"| {name} | {seconds:.0f} | {before:.0f} | {peak:.0f} | {server.mib:.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded/student")
    parser.add_argument("--requests", type=int, default=1000, help="before the attacks")
    parser.add_argument("--clients", type=int, default=32)
    arguments = parser.parse_args()
    prompts, expected = expected_logprobs(arguments.model, 200)
    server, rows = Server(arguments.model), list[str]()
    load = Load(server, prompts, expected)
    stages: list[tuple[str, Callable[[], None]]] = [
        ("a first request", lambda: load.right(0, "right")),
        ("load", lambda: peace(load, arguments.requests, arguments.clients, "right")),
        ("attack", lambda: siege(load, arguments.clients // 2)),
        ("the same attack again", lambda: siege(load, arguments.clients // 2)),
        (
            "load again",
            lambda: peace(load, arguments.requests // 4, arguments.clients, "right, afterwards"),
        ),
    ]
    try:
        for name, stage in stages:
            with measured(server, name, rows):
                stage()
        is_there = server.ask(None, path="/health")[0] == 200 and server.process.poll() is None
    finally:
        server.close()
    return print_tables(load, rows, is_there=is_there)


def print_tables(load: Load, rows: list[str], *, is_there: bool) -> int:
    print(
        "| stage | seconds | MiB before | MiB at most | MiB after |\n| --- | --- | --- | --- | --- "
        "|",
        *rows,
        sep="\n",
    )
    print("\n| client | requests or connections | outcome |\n| --- | --- | --- |")
    strange = []
    for client in dict.fromkeys(client for client, _ in load.outcomes):
        found = {outcome: n for (who, outcome), n in load.outcomes.items() if who == client}
        allowed = (
            ATTACKS[client][2] | {"503"}
            if client in ATTACKS
            else {"200", "503"}
            if "meanwhile" in client
            else {"200"}
        )
        strange += [f"{client}: {outcome}" for outcome in found if outcome not in allowed]
        print(
            f"| {client} | {sum(found.values()):,} | "
            f"{', '.join(f'{outcome}: {n:,}' for outcome, n in sorted(found.items()))} |"
        )
    seconds = sorted(load.seconds)
    median, tail = seconds[len(seconds) // 2], seconds[int(0.99 * len(seconds))]
    print(
        f"\nlargest error {load.worst_error:.1e} nats; wrong answers {load.num_wrong}; server "
        f"still there: {is_there}"
    )
    print(f"bytes that the server logged: {load.server.num_logged}")
    print(
        f"seconds of an answered request: median {median:.2f}, 99 % within {tail:.2f}, longest "
        f"{seconds[-1]:.2f}"
    )
    print("".join(f"not foreseen: {each}\n" for each in strange), end="")
    return bool(load.num_wrong or strange or not is_there)


if __name__ == "__main__":
    sys.exit(main())
