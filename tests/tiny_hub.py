"""A Hugging Face hub of one model, for huggingface_hub's own client:
HF_ENDPOINT=http://127.0.0.1:PORT."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "1" * 40


class _Hub(ThreadingHTTPServer):
    def __init__(self, name: str, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.handed_out = name, []
        self.files = {
            str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()
        }

    def content(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        """What lies at a path, and its headers."""
        api = f"/api/models/{self.name}"
        if path == f"{api}/revision/main":
            return _json(
                {
                    "id": self.name,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": file} for file in self.files],
                }
            )
        if path.startswith(f"{api}/tree/"):
            sizes = {name: file.stat().st_size for name, file in self.files.items()}
            return _json(
                [
                    {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                    for name, size in sizes.items()
                ]
            )
        file = self.files.get(path.removeprefix(f"/{self.name}/resolve/{COMMIT}/"))
        if file is None:
            return None
        body = file.read_bytes()
        return body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_HEAD(self) -> None:
        found = self.server.content(self.path.partition("?")[0])
        body, headers = found or (b"", {"X-Error-Code": "RepoNotFound"})
        self.send_response(200 if found else 404)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            if "ETag" in headers:
                self.server.handed_out.append(self.path.rpartition("/")[2])

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


def _json(content: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(content).encode(), {"Content-Type": "application/json"}


@contextmanager
def tiny_hub(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the files of a folder as model `name`; gives the address and the names of the files
    that were handed out."""
    server = _Hub(name, folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.handed_out
    finally:
        server.shutdown()
        server.server_close()
