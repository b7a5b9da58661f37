"""`rlad export model RUN --push USER/NAME`, with huggingface_hub's own client and a local stand-in
of the hub that takes every file as a regular one."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from exported_runs import write_run
from rlad.errors import UserError
from rlad.export.hub import require_push


class _Hub(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        address = f"http://127.0.0.1:{self.server.server_port}/ada/model"
        answer = {"url": address, "id": "ada/model", "name": "ada/model"}
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = {
                "files": [
                    {"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files
                ]
            }
        elif "/commit/" in self.path:
            oid = "1" * 40
            answer = {"commitUrl": f"{address}/commit/{oid}", "commitOid": oid}
            answer |= {"pullRequestUrl": None, "success": True}
        self._send(answer)

    def do_GET(self) -> None:
        self._send({"id": "ada/model", "sha": "1" * 40, "siblings": []})

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _send(self, answer) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_hub_gets_the_model_and_its_card(tmp_path, hub):
    run = write_run(tmp_path)
    (run / "README.md").write_text('# run\n\nfolder = "checkpoints/step-000001"\n')
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "rlad", "export", "model", str(run), "--push", "ada/model"]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].endswith("/ada/model")

    commits = [body for path, body, _ in hub.asked if "/commit/" in path]
    rows = [json.loads(line) for line in b"\n".join(commits).splitlines()]
    files = {
        row["value"]["path"]: base64.b64decode(row["value"]["content"])
        for row in rows
        if row["key"] == "file"
    }
    folder = tmp_path / "run-model"
    assert set(files) == {path.name for path in folder.iterdir()}
    assert all((folder / name).read_bytes() == content for name, content in files.items())
    assert {"model.safetensors", "config.json", "config.toml", "tokenizer.json"} <= set(files)
    assert b'folder = "ada/model"' in files["README.md"]
    assert all(token == "Bearer hf_secret" for _, _, token in hub.asked)


def test_a_wrong_name_and_no_login_are_told_before_anything_is_written(monkeypatch, tmp_path):
    for name in ("model", "a/b/c", "a b/c", ""):
        with pytest.raises(UserError, match="USER/NAME"):
            require_push(name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        require_push("ada/model")
