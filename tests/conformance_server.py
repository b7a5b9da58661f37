"""A server over a tiny model, with vLLM's `/v1/completions` and `/inference/v1/generate`, that
scores as it should, or misbehaves on purpose.

Scores are computed with the plain logits of the model, by none of rlad's own functions.
"""

import base64
import io
import json
import socket
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy
import torch
from torch import Tensor

from rlad.models.loading import LanguageModel

FLAWS = (
    "row ahead",  # llama-cpp-python: token i beside the logits that follow it
    "list shifted",  # the value of token i stands at i + 1
    "nan",
    "missing tokens",  # every third entry is null
    "one short",  # a list with an entry too few
    "wrong ids",  # each id is one higher
    "other strings",  # ids right, tokens read by another tokenizer
    "no strings",
    "not repeatable",
    "nothing",  # requests for log-probs are answered without any
    "zeros",
    "no generation log-probs",
)
FAULTS = (
    "500",
    "429",
    "slow",
    "dripping",
    "truncated",
    "huge",
    "not JSON",
    "list",
    "deep",
    "closed",
    "401",
    "404",
    "400",
    "307",
)


class ConformanceServer:
    """Listens on 127.0.0.1 in a thread of its own, from `with` or `start` to `kill`."""

    def __init__(self, language_model: LanguageModel, *, flaw: str = "", **settings: Any):
        """`flaw` spoils every score. `settings` override what is set here."""
        assert not flaw or flaw in FLAWS
        self.model, self.tokenizer, self.flaw = language_model.model, language_model.tokenizer, flaw
        self.name, self.context, self.port, self.repeats_key = "tiny", 256, 0, False
        self.root: str | None = None
        self.key: str | None = None
        self.understands: tuple[str, ...] = ("prompt_logprobs", "echo")
        """and `prompt_logprob_token_ids`, for the other route"""
        self.tempers = False
        self.max_logprobs = 20
        self.prefix = "/v1"
        self.faults: deque[str] = deque()
        """each spoils the answer to one completion request"""
        self.lasting_fault = ""
        """spoils the answer to every completion request"""
        self.slow_seconds = 5.0
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.counts: Counter[str] = Counter()
        self.num_open = self.max_open = 0
        self.__dict__.update(settings)
        self._lock, self._open = threading.Lock(), set[socket.socket]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    def start(self) -> "ConformanceServer":
        """Listen, on the same port as before if there was one."""
        self._http = _Server(("127.0.0.1", self.port), _Handler)
        self._http.owner = self
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def kill(self) -> None:
        """Stop listening and cut all connections."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.kill()

    # --- answers ----------------------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        card = {
            "id": self.name,
            "object": "model",
            "root": self.root,
            "max_model_len": self.context,
        }
        return {
            "object": "list",
            "data": [{key: value for key, value in card.items() if value is not None}],
        }

    def refusal(self, body: dict[str, Any]) -> str:
        prompt = body["prompt"]
        if body.get("model") != self.name:
            return f"The model `{body.get('model')}` does not exist."
        if len(prompt) + body["max_tokens"] > self.context:
            return f"This model's maximum context length is {self.context} tokens."
        num_wanted = body.get("prompt_logprobs") or len(
            (body.get("prompt_logprob_token_ids") or [[]])[0]
        )
        if num_wanted > self.max_logprobs:
            return f"Requested {num_wanted}, which is greater than max allowed: {self.max_logprobs}"
        if max(prompt) >= len(self.tokenizer):
            return f"Token id {max(prompt)} is out of vocabulary"
        return "a seed ends this engine" if "seed" in body else ""

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt: list[int] = body["prompt"]
        with self._lock, torch.no_grad():
            if "prompt_logprob_token_ids" in body:
                table = None if self.flaw == "nothing" else self._table(prompt, body)
                return {"choices": [{"token_ids": [2]}], "prompt_token_id_logprobs": table}
            written, values = self._write(prompt, body) if body["max_tokens"] else ([], [])
            choice: dict[str, Any] = {
                "index": 0,
                "text": self.tokenizer.decode(written),
                "logprobs": None,
            }
            if body.get("prompt_logprobs") is not None and "prompt_logprobs" in self.understands:
                choice["prompt_logprobs"] = self._prompt_logprobs(prompt, body)
            elif body.get("echo") and "echo" in self.understands:
                choice["logprobs"] = self._echo(prompt, body)
            elif body.get("logprobs") is not None and self.flaw != "no generation log-probs":
                choice["logprobs"] = {
                    "tokens": [self._name(t, body) for t in written],
                    "token_logprobs": values,
                }
        if self.flaw == "nothing":
            choice |= {"prompt_logprobs": None, "logprobs": choice["logprobs"] if written else None}
        return {"object": "text_completion", "choices": [choice]}

    def _write(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Always greedily: enough for these tests."""
        tokens: list[int] = []
        values: list[float] = []
        for _ in range(body["max_tokens"]):
            row = self._rows([*prompt, *tokens], 1.0)[-1]
            tokens.append(int(row.argmax()))
            values.append(float(row.max()))
        return tokens, values

    def _rows(self, tokens: list[int], temperature: float) -> Tensor:
        """Log-probs `[token, vocabulary]` of what follows each token."""
        return (self.model(torch.tensor([tokens])).logits[0].float() / temperature).log_softmax(
            dim=-1
        )

    def _scores(
        self, tokens: list[int], body: dict[str, Any]
    ) -> list[tuple[Any, dict[int, float]]]:
        """Of each token but the first: its log-prob, and the likeliest tokens."""
        asked = body.get("prompt_logprob_token_ids")
        is_tempered = self.tempers and (asked or body.get("temper_prompt_logprobs"))
        rows = self._rows(tokens, body["temperature"] if is_tempered else 1.0)
        rows = rows[1:] if self.flaw == "row ahead" else rows[:-1]
        if self.flaw == "not repeatable":
            rows = rows - torch.randn_like(rows).abs()
        if self.flaw == "zeros":
            rows = torch.zeros_like(rows)
        num_top = body.get("prompt_logprobs") or body.get("logprobs") or 0
        scores: list[tuple[Any, dict[int, float]]] = []
        for i, (row, token) in enumerate(zip(rows, tokens[1:], strict=True)):
            if asked and self.flaw == "wrong ids":
                token = (token + 1) % len(row)
            value: Any = float(row[token])
            value = (
                float("nan")
                if self.flaw == "nan"
                else None
                if self.flaw == "missing tokens" and i % 3 == 0
                else value
            )
            top = row.topk(num_top).indices.tolist()
            if asked:
                top = asked[max(i - body["prompt_logprob_start"], 0)]
            scores.append((value, {other: float(row[other]) for other in top}))
        if self.flaw == "list shifted":
            scores = [scores[-1], *scores[:-1]]
        return scores[:-1] if self.flaw == "one short" else scores

    def _prompt_logprobs(self, tokens: list[int], body: dict[str, Any]) -> list[Any]:
        entries: list[Any] = [None]
        scores = self._scores(tokens, body)
        for token, (value, top) in zip(tokens[1 : len(scores) + 1], scores, strict=True):
            if value is None:
                entries.append(None)
                continue
            shown = token + 1 if self.flaw == "wrong ids" else token
            values = {i: v for i, v in top.items() if i != token} | {shown: value}
            entries.append(
                {
                    str(i): {"logprob": v, "rank": 1, "decoded_token": self._text(i)}
                    for i, v in values.items()
                }
            )
        return entries

    def _table(self, tokens: list[int], body: dict[str, Any]) -> str:
        """A row for each row of ids in the request, as a file of numpy's."""
        scores = self._scores(tokens, body)[body["prompt_logprob_start"] :]
        rows = []
        given = tokens[body["prompt_logprob_start"] + 1 :]
        asked = body["prompt_logprob_token_ids"]
        for token, ids, (value, others) in zip(given, asked, scores, strict=False):
            row = [others.get(other) for other in ids]
            rows.append([value, *row[1:]] if ids[0] == token else row)
        content = io.BytesIO()
        numpy.save(content, numpy.array(rows, dtype="float32"))  # None becomes NaN
        return base64.b64encode(content.getvalue()).decode()

    def _echo(self, tokens: list[int], body: dict[str, Any]) -> dict[str, Any]:
        scores = self._scores(tokens, body)
        names = [self._name(token + (self.flaw == "wrong ids"), body) for token in tokens]
        top = [
            {self._name(i, body): value for i, value in likeliest.items()}
            for _, likeliest in scores
        ]
        return {
            "tokens": names,
            "token_logprobs": [None, *(value for value, _ in scores)],
            "top_logprobs": [None, *top],
        }

    def _name(self, token: int, body: dict[str, Any]) -> str:
        return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self._text(token)

    def _text(self, token: int) -> str:
        if self.flaw == "no strings":
            return ""
        return str(self.tokenizer.decode([token + (self.flaw == "other strings")]))


class _Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64
    owner: ConformanceServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that are cut are what is tested here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    server: _Server

    def setup(self) -> None:
        self.owner = self.server.owner
        self.owner._open.add(self.request)
        super().setup()

    def finish(self) -> None:
        self.owner._open.discard(self.request)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def is_allowed(self) -> bool:
        found = self.headers.get("Authorization", "")
        if self.owner.key is None or found == f"Bearer {self.owner.key}":
            return True
        self.answer(
            401,
            {
                "error": {
                    "message": f"Incorrect API key provided: {found}"
                    if self.owner.repeats_key
                    else "no"
                }
            },
        )
        return False

    def do_GET(self) -> None:
        if self.path != f"{self.owner.prefix}/models":
            self.answer(404, {"detail": "Not Found"})
        elif self.is_allowed():
            self.answer(200, self.owner.models())

    def do_POST(self) -> None:
        owner, body = self.owner, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "prompt_logprob_token_ids" in owner.understands and self.path == (
            owner.prefix.removesuffix("/v1") + "/inference/v1/generate"
        ):
            body = body["sampling_params"] | {"model": body["model"], "prompt": body["token_ids"]}
        elif self.path != f"{owner.prefix}/completions":
            self.answer(404, {"detail": "Not Found"})
            return
        if not self.is_allowed():
            return
        with owner._lock:
            owner.requests.append(body)
            owner.times.append(time.monotonic())
            fault = owner.faults.popleft() if owner.faults else owner.lasting_fault
            owner.num_open += 1
            owner.max_open = max(owner.max_open, owner.num_open)
        try:
            self.respond(body, fault)
        finally:
            with owner._lock:
                owner.num_open -= 1

    def respond(self, body: dict[str, Any], fault: str) -> None:
        if fault.isdecimal():
            extra = {"Location": "http://127.0.0.1:9/v1/completions"} if fault == "307" else {}
            self.answer(int(fault), {"error": {"message": f"no, {fault}"}}, **extra)
        elif fault:
            self.misbehave(fault, json.dumps(self.owner.completion(body)).encode())
        elif refusal := self.owner.refusal(body):
            self.answer(
                404 if "does not exist" in refusal else 400, {"error": {"message": refusal}}
            )
        else:
            self.answer(200, self.owner.completion(body))

    def misbehave(self, fault: str, right: bytes) -> None:
        contents = {"not JSON": b"<html>It works!</html>", "list": b"[1, 2]", "deep": b"[" * 60_000}
        match fault:
            case "slow":
                time.sleep(self.owner.slow_seconds)
                self.send(200, right)
            case "dripping":
                self.begin(200, len(right))
                for byte in right:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.05)
            case "truncated":
                self.send(200, right[: len(right) // 2])
            case "closed":
                self.begin(200, len(right))
                self.wfile.write(right[: len(right) // 2])
                self.close_connection = True
            case "huge":
                self.begin(200, 1 << 40)
                for _ in range(1000):
                    self.wfile.write(b" " * (1 << 20))
                    self.owner.counts["huge MiB"] += 1
            case _:
                self.send(200, contents[fault])

    def answer(self, status: int, table: dict[str, Any], **headers: str) -> None:
        self.send(status, json.dumps(table).encode(), **headers)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.begin(status, len(content), **headers)
        self.wfile.write(content)

    def begin(self, status: int, size: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(size)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
