"""What a vLLM server is asked before a run, what of its answers is taken, and the weights on disk;
against a stand-in that answers as vLLM 0.32 does. `test_vllm_server.py` asks the real one."""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.models.adapters import merged_weights
from rlad.replicas import ServerUnavailableError
from rlad.rollouts import vllm_protocol
from rlad.rollouts.types import Completion
from rlad.rollouts.vllm_protocol import (
    EXTENSION,
    GENERATE,
    Needs,
    load_weights,
    read_completions,
    require_usable,
    write_weights,
)
from rlad.rollouts.vllm_server import make_client, probe_prompts
from tiny_models import tiny_model

NEEDS = Needs(num_tokens=100, dtype="float32", vocabulary=64, width=32, is_tied=True)
CONFIG = {
    "model_config": {
        "max_model_len": 128,
        "dtype": "torch.float32",
        "logprobs_mode": "processed_logprobs",
    },
    "parallel_config": {"worker_extension_cls": EXTENSION},
    "device_config": {"device": "cpu"},
    "scheduler_config": {"enable_chunked_prefill": False},
}
INSPECTION = "LlamaForCausalLM()(embed: Embedding(num_embeddings=64, x=1, embedding_dim=32))"
ANSWERS: dict[str, Any] = {
    "/version": {"version": "0.32.0"},
    "/server_info?config_format=json": {"vllm_config": CONFIG},
    "/collective_rpc": {"results": [INSPECTION]},
    GENERATE: {},
}


@contextmanager
def server(changes: dict[str, Any], heard: list[tuple[str, bytes]] | None = None) -> Iterator[str]:
    """One that answers as `ANSWERS` and `changes` say; None is 404. `heard` gets the requests."""
    answers = ANSWERS | changes

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if heard is not None:
                heard.append((self.path, body))
            answer = answers.get(self.path)
            content = json.dumps(answer).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def client_of(url: str) -> Any:
    vllm = {"urls": [url], "num_retries": 0}
    return closing(make_client(RolloutConfig.model_validate({"engine": "vllm", "vllm": vllm})))


def asked(changes: dict[str, Any], needs: Needs = NEEDS) -> Any:
    with server(changes) as url, client_of(url) as client:
        return require_usable(client, url, needs)


def started_with(section: str, **settings: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config[section] |= settings
    return {"/server_info?config_format=json": {"vllm_config": config}}


def test_a_server_that_fits_is_taken() -> None:
    info = asked({})
    assert (info.version, info.max_tokens) == ("0.32.0", 128)
    assert info.has_extension and info.takes_seeds
    # Several seeded requests would end its engine.
    assert not asked(started_with("scheduler_config", enable_chunked_prefill=True)).takes_seeds
    on_gpu = started_with("device_config", device="cuda")
    assert asked(on_gpu | {"/collective_rpc": None}).takes_seeds


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"/version": {"version": "0.31.2"}}, "vLLM 0.31.2 runs at .*, but 0.32 is the tested"),
        ({"/version": {"version": "0.320.0"}}, "vLLM 0.320.0 runs at"),
        ({"/version": None}, "so it is not a vLLM server; correct rollout.vllm.urls"),
        ({"/server_info?config_format=json": None}, "takes no weights.*VLLM_SERVER_DEV_MODE=1"),
        ({"/server_info?config_format=json": {"other": 1}}, "does not say how it was started"),
        (started_with("model_config", max_model_len=99), "takes 99 tokens.* --max-model-len 100"),
        (started_with("model_config", dtype="torch.bfloat16"), "computes in bfloat16, but the"),
        (started_with("model_config", logprobs_mode="raw_logprobs"), "reports raw_logprobs"),
        (started_with("parallel_config", worker_extension_cls=""), "tied output layer"),
        (
            {"/collective_rpc": {"results": ["M(e: E(num_embeddings=64, embedding_dim=16))"]}},
            r"another model, with embeddings of \(64, 16\), but the student's are \(64, 32\)",
        ),
        ({GENERATE: None}, "does not complete token ids .*--enable-scale-out"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_in_a_sentence(changes, sentence) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        asked(changes)
    assert str(error.value).endswith(".") and str(error.value).count("; ") == 1


def test_the_output_layer_stays_old_on_the_cpu_of_tied_models_alone() -> None:
    without = started_with("parallel_config", worker_extension_cls="")
    assert not asked(without, Needs(100, "float32", 64, 32, is_tied=False)).has_extension
    on_gpu = copy.deepcopy(without)
    on_gpu["/server_info?config_format=json"]["vllm_config"]["device_config"]["device"] = "cuda"
    assert not asked(on_gpu).has_extension


# --- completions ----------------------------------------------------------------------------------


def choice(
    index: int = 0, reason: str = "stop", version: str = "a", **changes: Any
) -> dict[str, Any]:
    content = [{"token_id": 7 + index, "logprob": -0.5, "rank": 1}, {"token_id": 1, "logprob": -1}]
    spans = [{"version": version, "start": 0, "end": 2}]
    return {
        "index": index,
        "finish_reason": reason,
        "logprobs": {"content": content},
        "weight_versions": spans,
        **changes,
    }


def test_completions_come_in_their_order_with_the_versions_of_their_weights() -> None:
    answer = {"choices": [choice(1, "length", "b"), choice(0)], "more": None}
    completions, versions = read_completions(answer)
    assert completions == [
        Completion((7, 1), (-0.5, -1.0), is_truncated=False),
        Completion((8, 1), (-0.5, -1.0), is_truncated=True),
    ]
    assert versions == {"a", "b"}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [choice(reason="abort")]},  # by a server that is being stopped
        {"choices": [choice(logprobs=None)]},
        {"choices": [choice(logprobs={"content": []})]},
        {"choices": [choice(weight_versions=None)]},
        {"choices": [choice(finish_reason=None)]},
    ],
)
def test_an_answer_that_cannot_be_used_is_asked_for_again(answer) -> None:
    with pytest.raises(ServerUnavailableError):
        read_completions(answer)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_bytes", [2**30, 20_000, 1])
def test_weights_are_written_whole_whatever_the_size_of_a_file(
    tmp_path: Path, monkeypatch, most_bytes
) -> None:
    monkeypatch.setattr(vllm_protocol, "_MOST_FILE_BYTES", most_bytes)
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        write_weights(merged_weights(model), tmp_path / "w", dtype=torch.bfloat16)
    files = sorted((tmp_path / "w").iterdir())
    parts = [load_file(file) for file in files]
    for part in parts:
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= most_bytes
    assert len(parts) == {2**30: 1, 20_000: 3, 1: 21}[most_bytes]
    found = {name: value for part in parts for name, value in part.items()}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, None),
        ({"/reset_prefix_cache": {"success": False}}, "still completes prompts of somebody else"),
        ({"/weight_info": {"weight_version": "loading-b-1"}}, "somebody else's weights"),
    ],
)
def test_weights_have_their_name_only_when_all_of_them_are_there(changes, error) -> None:
    """Before they change, the version of the former ones is gone: a run for which the server still
    writes does not use what comes."""
    answers = {
        "/update_weight_version": {},
        "/reset_prefix_cache": {"success": True},
        "/weight_info": {"weight_version": "loading-a-1"},
    }
    info = asked({})
    heard: list[tuple[str, bytes]] = []
    outcome: Any = pytest.raises(ServerUnavailableError, match=error) if error else nullcontext()
    with server(answers | changes, heard) as url, client_of(url) as client, outcome:
        load_weights(client, url, Path("folder"), version="a-1", info=info)
    named = [json.loads(body)["new_version"] for path, body in heard if "update" in path]
    assert [path for path, _ in heard[:2]] == ["/update_weight_version", "/collective_rpc"]
    assert named == (["loading-a-1"] if error else ["loading-a-1", "a-1"])


# --- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rollout", "sentence"),
    [
        ({"vllm": {"urls": ["http://127.0.0.1:1"]}}, "rollout.engine is 'native'"),
        ({"engine": "vllm", "max_staleness": 1}, "needs a vLLM server"),
        ({"engine": "vllm", "vllm": {"urls": ["http://h:1", "http://h:1/"]}}, "a server twice"),
        ({"engine": "vllm", "vllm": {"urls": ["http://h:1", "http://h:1/v1/"]}}, "a server twice"),
        ({"engine": "vllm", "vllm": {"urls": ["http://h:1"]}}, "is on another machine"),
        ({"engine": "vllm", "vllm": {"urls": ["h:1"]}}, "must be an address"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(rollout, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        RolloutConfig.model_validate(rollout)


@pytest.mark.parametrize("vocabulary", [1, 7, 10, 50_000])
def test_what_a_server_is_first_asked_to_complete_fits_every_vocabulary(vocabulary) -> None:
    prompts = probe_prompts(vocabulary)
    assert [len(prompt) for prompt in prompts] == [4, 3]
    assert all(0 <= token < vocabulary for prompt in prompts for token in prompt)
