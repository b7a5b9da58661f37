"""A server that speaks `/v1/chat/completions` on 127.0.0.1, and says what it is told to."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from running_servers import free_port


def chat_answer(text: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


@dataclass
class ChatServer:
    """What it says, and what it was asked."""

    port: int = field(default_factory=free_port)
    text: str | None = ""
    failures: list[int] = field(default_factory=list)
    """status of the next answers, before it says anything"""
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """path, headers and body"""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def serving(chat: ChatServer) -> Iterator[ChatServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat.asked.append((self.path, dict(self.headers), body))
            status = chat.failures.pop(0) if chat.failures else 200
            error = {"error": {"message": "the model `tiny` does not exist"}}
            answer = json.dumps(chat_answer(chat.text) if status == 200 else error).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", chat.port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
