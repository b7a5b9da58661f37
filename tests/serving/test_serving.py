"""rlad's own teacher server: its numbers against plain transformers, what it refuses, and its
command."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad
from rlad.cli.serve import ServeOptions, start_vllm
from rlad.models.loading import LanguageModel
from rlad.runs.directory import RunDirectory
from running_servers import Client, free_port, server_thread, wait_for
from tiny_models import EOS, VOCABULARY, LargestTensor, random_tokens, tiny_language_model
from tiny_runs import OFTEN_CORRECT, rlad_fails, run_config

pytest.importorskip("fastapi", reason="needs the optional package fastapi (rlad[serve])")
pytest.importorskip("uvicorn", reason="needs the optional package uvicorn (rlad[serve])")
pytestmark = pytest.mark.serve

PROMPTS = random_tokens(5, 2, 12, 3)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model()


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Client]:
    with server_thread(model) as client:
        yield client


def reference(model: LanguageModel, ids: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probs of all tokens at all positions but the first, float64 `[tokens - 1,
    vocabulary]`."""
    with torch.no_grad():
        logits = deepcopy(model.model).double()(input_ids=torch.tensor([ids])).logits[0, :-1]
    return (logits / temperature).log_softmax(dim=-1)


def given(logprobs: Tensor, ids: list[int]) -> list[float]:
    return logprobs.gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None]).squeeze(1).tolist()


def values(choice: dict[str, Any], prompt: list[int]) -> list[float]:
    """The given tokens' log-probs in `prompt_logprobs`."""
    first, *others = choice["prompt_logprobs"]
    assert first is None
    return [entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], others, strict=True)]


def prompt_logprobs(server: Client, prompt: list[int], **body: Any) -> list[float]:
    asked = {"model": "tiny", "prompt": prompt, "prompt_logprobs": 0, "max_tokens": 1, **body}
    return values(server.completion(**asked), prompt)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_logprobs(server, model, prompt):
    choice = server.completion(model="tiny", prompt=prompt, prompt_logprobs=0, max_tokens=0)
    assert values(choice, prompt) == pytest.approx(
        given(reference(model, prompt), prompt), abs=1e-5
    )
    assert all(len(entry) == 1 for entry in choice["prompt_logprobs"][1:])


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits: no linear head
def test_likeliest_tokens(family):
    model, prompt = tiny_language_model(family), PROMPTS[2]
    with server_thread(model) as server:
        choice = server.completion(model="tiny", prompt=prompt, prompt_logprobs=3, max_tokens=0)
    expected = reference(model, prompt)
    assert values(choice, prompt) == pytest.approx(given(expected, prompt), abs=1e-5)
    for token, entry, row in zip(prompt[1:], choice["prompt_logprobs"][1:], expected, strict=True):
        assert entry[str(token)]["decoded_token"] == f"w{token}"
        top = row.topk(3)
        assert set(entry) == {str(token), *map(str, top.indices.tolist())}
        for other, logprob in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            assert entry[str(other)]["logprob"] == pytest.approx(logprob, abs=1e-5)


def test_temperature_is_applied_to_given_tokens_only_when_that_is_asked_for(server, model):
    prompt = PROMPTS[2]
    plain = prompt_logprobs(server, prompt, temperature=0.5)
    tempered = {"temperature": 0.5, "temper_prompt_logprobs": True}
    assert plain == pytest.approx(given(reference(model, prompt), prompt), abs=1e-5)
    expected = pytest.approx(given(reference(model, prompt, 0.5), prompt), abs=1e-5)
    for num_top in (0, 1):
        assert prompt_logprobs(server, prompt, prompt_logprobs=num_top, **tempered) == expected


@pytest.mark.parametrize(
    ("temperature", "is_tempered"), [(0, False), (1, False), (0.7, False), (0.7, True)]
)
def test_generated_logprobs_equal_scored_ones(server, model, temperature, is_tempered):
    prompt = PROMPTS[2]
    how = {"temperature": temperature, "temper_prompt_logprobs": is_tempered}
    asked = {"max_tokens": 9, "logprobs": 1, "return_tokens_as_token_ids": True, **how}
    told = server.completion(model="tiny", prompt=prompt, **asked)["logprobs"]
    written = [int(name.removeprefix("token_id:")) for name in told["tokens"]]
    assert len(written) == 9 or (1 <= len(written) < 9 and written[-1] == EOS)
    text = [*prompt, *written]
    expected = reference(model, text, temperature if is_tempered else 1.0)
    assert told["token_logprobs"] == pytest.approx(given(expected, text)[-len(written) :], abs=1e-5)
    if temperature == 0:
        assert written == expected[len(prompt) - 1 :].argmax(dim=1).tolist()


def test_a_logprob_that_is_not_finite_is_null():
    model = tiny_language_model()
    with torch.no_grad():
        model.model.get_output_embeddings().weight[7] = torch.nan
    with server_thread(model) as server:
        assert prompt_logprobs(server, [5, 6, 8]) == [None, None]
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 2}
        status, answer = server.ask("POST", "/v1/completions", body)
    assert status == 500 and "not finite" in answer["detail"]


# --- batches --------------------------------------------------------------------------------------


class HeldModel:
    """Records the shape of each forward pass, and lets the first one wait until `go`."""

    def __init__(self, model: LanguageModel):
        self.shapes: list[tuple[int, int]] = []
        self.started, self.go = threading.Event(), threading.Event()
        self._handle = model.model.base_model.register_forward_pre_hook(
            self._hold, with_kwargs=True
        )

    def _hold(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        self.shapes.append(tuple(named["input_ids"].shape))
        self.started.set()
        self.go.wait(timeout=60)

    def __enter__(self) -> "HeldModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.go.set()
        self._handle.remove()


def test_requests_that_wait_are_scored_together(model):
    prompts = random_tokens(*range(3, 19), seed=1)
    with server_thread(model, tokens_per_batch=200) as server:
        alone = [prompt_logprobs(server, prompt) for prompt in prompts]
        with HeldModel(model) as held, ThreadPoolExecutor(len(prompts)) as pool:
            first = pool.submit(prompt_logprobs, server, prompts[0])
            held.started.wait(timeout=60)
            others = [pool.submit(prompt_logprobs, server, prompt) for prompt in prompts[1:]]
            wait_for(lambda: len(server.server.waiting) == len(others), seconds=30)
            held.go.set()
            together = [first.result(), *(other.result() for other in others)]
    # 15 texts of 4 to 18 tokens, 165 in all, cut by padded size into two passes; then the shortest
    # once more by itself, as they were together for the first time.
    assert held.shapes[0] == (1, 3) and held.shapes[3:] == [(1, 4)]
    assert sum(rows for rows, _ in held.shapes[1:3]) == 15
    assert all(rows * width <= 200 for rows, width in held.shapes)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_work_of_a_client_that_has_gone_is_given_up(model):
    body = json.dumps({"model": "tiny", "prompt": [3] * 40, "prompt_logprobs": 0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with server_thread(model) as server, HeldModel(model) as held, ThreadPoolExecutor(1) as pool:
        first = pool.submit(prompt_logprobs, server, [3, 4, 5])
        held.started.wait(timeout=60)
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(head + body)
            wait_for(lambda: len(server.server.waiting) == 1, seconds=30)
        time.sleep(0.2)
        held.go.set()
        first.result()
        prompt_logprobs(server, [3, 4])
    assert held.shapes == [(1, 3), (1, 2)]


def test_a_request_for_a_score_alone_generates_nothing(model):
    with server_thread(model) as server, HeldModel(model) as held:
        held.go.set()
        choice = server.completion(model="tiny", prompt=[3] * 5, prompt_logprobs=0, max_tokens=1)
    assert held.shapes == [(1, 5)] and choice["text"] == ""


def test_a_failure_ends_its_request_only(model):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory: tried to allocate\nmuch")

    with server_thread(model) as server:
        handle = model.model.base_model.register_forward_pre_hook(fail)
        body = {"model": "tiny", "prompt": [3, 4], "prompt_logprobs": 0}
        status, answer = server.ask("POST", "/v1/completions", body)
        handle.remove()
        assert status == 500 and answer["detail"].endswith("out of memory: tried to allocate")
        assert server.is_healthy()
        assert prompt_logprobs(server, [3, 4]) == pytest.approx(
            given(reference(model, [3, 4]), [3, 4]), abs=1e-5
        )


def test_likeliest_tokens_never_hold_all_logits():
    model = tiny_language_model(vocab_size=8192, max_position_embeddings=1024)
    (prompt,) = random_tokens(1024)
    with server_thread(model, max_context_tokens=1024) as server, LargestTensor() as largest:
        asked = server.server.compute
        from rlad.serving.protocol import CompletionRequest

        asked([CompletionRequest(model="tiny", prompt=prompt, prompt_logprobs=5, max_tokens=1)])
    assert largest.num_elements == 2**22 < 1023 * 8192


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "'tiny' is"),
        ({"model": 3}, 400, "model: input should be a valid string."),
        ({"prompt": "w3 w4"}, 400, "prompt: input should be a valid array."),
        ({"prompt": [3]}, 400, "prompt: list should have at least 2 items"),
        ({"prompt": [3, -1]}, 400, "prompt: input should be greater than or equal to 0."),
        ({"prompt": [3, 1.5]}, 400, "prompt: input should be a valid integer"),
        ({"prompt": [3, VOCABULARY]}, 400, "token id 64 is out of the model's vocabulary of 64"),
        ({"prompt": [3] * 60, "max_tokens": 5}, 400, "more than the context of 64 tokens."),
        ({"max_tokens": -1}, 400, "max_tokens: "),
        ({"prompt_logprobs": 65}, 400, "prompt_logprobs: input should be less than or equal"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"stream": True}, 400, "stream: extra inputs are not permitted."),
    ],
)
def test_refused_with_one_sentence(server, change, status, words):
    body = {"model": "tiny", "prompt": [3, 4], **change}
    answered, answer = server.ask("POST", "/v1/completions", body)
    message = answer["detail"]
    assert answered == status
    assert words in message and "\n" not in message and message.endswith(".")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": "tiny", "temperature": NaN}'],
)
def test_what_is_no_request(server, body):
    status, answer = server.ask("POST", "/v1/completions", body)
    assert status == 400 and answer["detail"]


def test_the_longest_text_fits(server):
    assert "text" in server.completion(model="tiny", prompt=[3] * 60, max_tokens=4)


def test_large_requests_and_those_of_unknown_size_are_refused_unread(server):
    status, answer = server.ask("POST", "/v1/completions", b"", **{"Content-Length": "99999999"})
    assert status == 413 and "Content-Length of at most 16 MiB" in answer["detail"]
    assert server.ask("POST", "/v1/completions", iter([b"{}"]))[0] == 413


def test_key(model):
    body = {"model": "tiny", "prompt": [3, 4], "prompt_logprobs": 0}
    wrongs = ("", "Bearer ", "sesame", "Bearer sesam", "Bearer sesamee", "Bearer s\xe9same")
    with server_thread(model, api_key="sesame") as server:
        assert server.ask("GET", "/health", Authorization="")[0] == 200
        for wrong in wrongs:
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions")):
                status, answer = server.ask(method, path, body, Authorization=wrong)
                assert status == 401 and "Authorization: Bearer KEY" in answer["detail"]
                assert "sesame" not in json.dumps(answer)
        assert server.ask("GET", "/v1/models")[0] == 200
        assert server.ask("POST", "/v1/completions", body)[0] == 200


def test_models_and_what_is_not_there(server, model):
    status, answer = server.ask("GET", "/v1/models")
    (row,) = answer["data"]
    wanted = ("tiny", model.name, 64)
    assert status == 200 and (row["id"], row["root"], row["max_model_len"]) == wanted
    assert server.ask("GET", "/v1/nothing")[0] == 404
    assert server.ask("GET", "/v1/completions")[0] == 405
    assert server.ask("GET", "/docs")[0] == 404


def test_a_mixture_of_clients(server, model):
    """Right, wrong and impatient clients at once: each right one is answered right, each wrong one
    with its status."""
    prompts = random_tokens(*(3 + i % 40 for i in range(60)), seed=4)
    wrong: list[tuple[Any, int]] = [
        (b"{", 400),
        ({"model": "other", "prompt": [3, 4]}, 404),
        ({"model": "tiny", "prompt": [3, 999]}, 400),
    ]

    def ask(i: int) -> None:
        if i % 3 == 0:
            body, status = wrong[i // 3 % len(wrong)]
            assert server.ask("POST", "/v1/completions", body)[0] == status
        elif i % 3 == 1:
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as gone:
                gone.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 10\r\n\r\n{")
        else:
            assert prompt_logprobs(server, prompts[i]) == pytest.approx(
                given(reference(model, prompts[i]), prompts[i]), abs=1e-5
            )

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(60)))


# --- the command ----------------------------------------------------------------------------------


def test_a_run_with_a_served_teacher_equals_one_with_a_local(world, tmp_path):
    port, rollout = free_port(), {"temperature": 0.8, "max_prompt_tokens": 16}
    command = [sys.executable, "-m", "rlad", "serve-teacher", str(world / "teacher")]
    command += ["--engine", "rlad", "--port", str(port), "--served-name", "it"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready. In your config:\n"
        section = tomllib.loads("".join(process.stdout.readline() for _ in range(4)))["teacher"]
        assert section == {"type": "served", "urls": [f"http://127.0.0.1:{port}/v1"], "model": "it"}
        served = rlad.train(
            run_config(
                world, tmp_path / "served", teacher=section, rollout=rollout, task=OFTEN_CORRECT
            )
        )
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "rlad: interrupted\n")
    local = rlad.train(run_config(world, tmp_path / "local", rollout=rollout, task=OFTEN_CORRECT))
    for ours, theirs in zip(
        *(RunDirectory(run.run_dir).read("metrics.jsonl") for run in (served, local)), strict=True
    ):
        for name in ("teacher/log_ratio/mean", "loss", "optimization/grad_norm"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert any(name.startswith("teacher/log_ratio") for name in theirs)


def test_mistakes_end_in_one_sentence(world, monkeypatch):
    teacher = world / "teacher"
    own = ("--engine", "rlad")
    monkeypatch.delenv("RLAD_TEACHER_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rlad_fails("serve-teacher", teacher, *own, "--port", port)
        assert f"cannot listen on port {port} of '127.0.0.1'" in message and "in use" in message
    assert "cannot be found or read" in rlad_fails("serve-teacher", world / "nothing", *own)
    assert "cannot listen on" in rlad_fails(
        "serve-teacher", teacher, *own, "--host", "127.0.0.1.5", "--without-key"
    )
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        message = rlad_fails("serve-teacher", teacher, *own, "--host", host)
        assert "can be reached from other machines" in message and "--without-key" in message
    monkeypatch.setenv("RLAD_TEACHER_API_KEY", "two words")
    assert "RLAD_TEACHER_API_KEY holds spaces" in rlad_fails("serve-teacher", teacher, *own)
    monkeypatch.delenv("RLAD_TEACHER_API_KEY")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "uvicorn" or None)
    assert "server needs uvicorn, which is not" in rlad_fails("serve-teacher", teacher, *own)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'rlad[serve]'" in rlad_fails("serve-teacher", teacher)
    assert "vllm is not installed" in rlad_fails("serve-teacher", teacher, "--engine", "vllm")


def test_vllm_is_started_with_the_key_out_of_sight(monkeypatch):
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.extend(arguments))
    monkeypatch.setattr(os, "environ", {"A": "b"})
    options = ServeOptions(model="embedded/teacher", tokens_per_batch=4096, max_context_tokens=2048)
    start_vllm(options, 8123, "secret")
    program, command, environment = started
    assert program == sys.executable
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = dict(zip(command[3::2], command[4::2], strict=False))
    assert Path(flags["--model"], "config.json").exists()
    assert flags["--served-model-name"] == "embedded/teacher"
    assert (flags["--host"], flags["--port"], flags["--dtype"]) == ("127.0.0.1", "8123", "float32")
    assert (flags["--max-num-batched-tokens"], flags["--max-model-len"]) == ("4096", "2048")
    assert (flags["--logprobs-mode"], flags["--generation-config"]) == ("raw_logprobs", "vllm")
    assert environment.pop("VLLM_API_KEY") == "secret" and "secret" not in " ".join(command)
    wanted = {"A": "b", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    is_cpu = not torch.cuda.is_available()
    assert ("--enforce-eager" in command) == is_cpu
    assert environment == wanted | ({"VLLM_CPU_KVCACHE_SPACE": "2"} if is_cpu else {})
