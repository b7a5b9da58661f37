"""rlad's own teacher server: its numbers against plain transformers, what it refuses, and its
command."""

import json
import signal
import socket
import subprocess
import sys
import threading
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
from rlad.cli.serve import ServeOptions, vllm_command, vllm_environment
from rlad.models.loading import LanguageModel
from rlad.runs.directory import RunDirectory
from rlad.scoring.scorer import Scorer
from rlad.serving.worker import score_with_top
from running_servers import Client, free_port, server_thread, wait_for
from tiny_models import EOS, VOCABULARY, LargestTensor, random_tokens, tiny_language_model
from tiny_runs import rlad_fails, run_config

pytest.importorskip("fastapi", reason="needs the optional package fastapi (rlad[serve])")
pytest.importorskip("uvicorn", reason="needs the optional package uvicorn (rlad[serve])")
pytestmark = pytest.mark.serve

PROMPTS = random_tokens(5, 1, 12, 2)


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


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_prompt_logprobs_of_several_prompts(server, model):
    choices = server.completions(model="tiny", prompt=PROMPTS, prompt_logprobs=0, max_tokens=0)
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice, prompt in zip(choices, PROMPTS, strict=True):
        assert values(choice, prompt) == pytest.approx(
            given(reference(model, prompt), prompt), abs=1e-5
        )
        assert all(len(entry) == 1 for entry in choice["prompt_logprobs"][1:])


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits: no linear head
def test_ranks_and_top_tokens(family):
    model, prompt = tiny_language_model(family), PROMPTS[2]
    with server_thread(model) as server:
        (choice,) = server.completions(model="tiny", prompt=prompt, prompt_logprobs=3, max_tokens=0)
    expected = reference(model, prompt)
    assert values(choice, prompt) == pytest.approx(given(expected, prompt), abs=1e-5)
    for token, entry, row in zip(prompt[1:], choice["prompt_logprobs"][1:], expected, strict=True):
        assert entry[str(token)]["rank"] == int((row > row[token]).sum()) + 1
        assert entry[str(token)]["decoded_token"] == f"w{token}"
        top = row.topk(3)
        assert set(entry) == {str(token), *map(str, top.indices.tolist())}
        for other, logprob, rank in zip(
            top.indices.tolist(), top.values.tolist(), (1, 2, 3), strict=True
        ):
            assert entry[str(other)]["rank"] == rank
            assert entry[str(other)]["logprob"] == pytest.approx(logprob, abs=1e-5)


@pytest.mark.parametrize("num_top", [0, 2])
def test_echo_gives_the_same_in_openais_form(server, model, num_top):
    choices = server.completions(
        model="tiny",
        prompt=PROMPTS,
        echo=True,
        logprobs=num_top,
        max_tokens=0,
        return_tokens_as_token_ids=True,
    )
    for choice, prompt in zip(choices, PROMPTS, strict=True):
        told, expected = choice["logprobs"], reference(model, prompt)
        assert told["tokens"] == [f"token_id:{token}" for token in prompt]
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
        assert told["token_logprobs"][1:] == pytest.approx(given(expected, prompt), abs=1e-5)
        for token, top, row in zip(prompt[1:], told["top_logprobs"][1:], expected, strict=True):
            assert set(top) == {
                f"token_id:{other}" for other in [token, *row.topk(num_top).indices.tolist()]
            }
        assert told["text_offset"][:2] == [0, len(told["tokens"][0])][: len(prompt)]
    assert choices[3]["text"] == " ".join(f"w{token}" for token in PROMPTS[3])


def test_temperature_is_applied_to_given_tokens_only_when_that_is_asked_for(server, model):
    prompt, body = (
        PROMPTS[2],
        {"model": "tiny", "prompt": PROMPTS[2], "prompt_logprobs": 0, "temperature": 0.5},
    )
    (plain,) = server.completions(**body)
    (tempered,) = server.completions(**body, temper_prompt_logprobs=True)
    (top,) = server.completions(**(body | {"prompt_logprobs": 1}), temper_prompt_logprobs=True)
    assert values(plain, prompt) == pytest.approx(given(reference(model, prompt), prompt), abs=1e-5)
    assert values(tempered, prompt) == pytest.approx(
        given(reference(model, prompt, 0.5), prompt), abs=1e-5
    )
    assert values(top, prompt) == pytest.approx(values(tempered, prompt), abs=1e-5)


@pytest.mark.parametrize("num_top", [0, 2])
@pytest.mark.parametrize(
    ("temperature", "is_tempered"), [(0, False), (1, False), (0.7, False), (0.7, True)]
)
def test_generated_logprobs_equal_scored_ones(server, model, temperature, is_tempered, num_top):
    prompts = [PROMPTS[0], PROMPTS[2]]
    asked = {
        "temperature": temperature,
        "temper_prompt_logprobs": is_tempered,
        "seed": 3,
        "return_token_ids": True,
    }
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 9, "logprobs": num_top, **asked}
    choices = server.completions(**body)
    for choice, prompt in zip(choices, prompts, strict=True):
        text = [*choice["prompt_token_ids"], *choice["token_ids"]]
        assert choice["prompt_token_ids"] == prompt and 1 <= len(choice["token_ids"]) <= 9
        expected = reference(model, text, temperature if is_tempered else 1.0)[len(prompt) - 1 :]
        told = choice["logprobs"]
        assert told["token_logprobs"] == pytest.approx(
            given(expected, [0, *choice["token_ids"]]), abs=1e-5
        )
        assert len(told["top_logprobs"][0]) in (num_top, num_top + 1, 1)
        if temperature == 0:
            assert choice["token_ids"] == expected.argmax(dim=1).tolist()
        assert choice["finish_reason"] == ("stop" if choice["token_ids"][-1] == EOS else "length")
    echoed = server.completions(**body, echo=True)
    for choice, with_prompt in zip(choices, echoed, strict=True):
        assert with_prompt["token_ids"] == choice["token_ids"]
        end = with_prompt["logprobs"]["token_logprobs"][-len(choice["token_ids"]) :]
        assert end == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-5)


def test_text_prompts_are_their_tokens(server):
    body = {"model": "tiny", "prompt_logprobs": 0, "max_tokens": 0}
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in PROMPTS]
    assert [choice["prompt_logprobs"] for choice in server.completions(prompt=texts, **body)] == [
        choice["prompt_logprobs"] for choice in server.completions(prompt=PROMPTS, **body)
    ]
    assert len(server.completions(prompt=texts[2], **body)[0]["prompt_logprobs"]) == len(PROMPTS[2])


def test_a_logprob_that_is_not_finite_is_null():
    model = tiny_language_model()
    with torch.no_grad():
        model.model.get_output_embeddings().weight[7] = torch.nan
    with server_thread(model) as server:
        (choice,) = server.completions(
            model="tiny", prompt=[5, 6, 8], prompt_logprobs=0, max_tokens=0
        )
        status, answer = server.ask(
            "POST", "/v1/completions", {"model": "tiny", "prompt": [5], "max_tokens": 2}
        )
    assert values(choice, [5, 6, 8]) == [None, None]
    assert status == 500 and "not finite" in answer["error"]["message"]


# --- batches ----------------------------------------------------------------------------------------------------------


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


def prompt_logprobs(server: Client, prompt: list[int]) -> list[float]:
    return values(
        server.completions(model="tiny", prompt=prompt, prompt_logprobs=0, max_tokens=1)[0], prompt
    )


def test_requests_that_wait_are_scored_together(model):
    prompts = random_tokens(*range(3, 19), seed=1)
    with server_thread(model, tokens_per_batch=200) as server:
        alone = [prompt_logprobs(server, prompt) for prompt in prompts]
        with HeldModel(model) as held, ThreadPoolExecutor(len(prompts)) as pool:
            first = pool.submit(prompt_logprobs, server, prompts[0])
            held.started.wait(timeout=60)
            others = [pool.submit(prompt_logprobs, server, prompt) for prompt in prompts[1:]]
            wait_for(lambda: len(server.worker._waiting) == len(others), seconds=30)
            held.go.set()
            together = [first.result(), *(other.result() for other in others)]
    # 15 texts of 4 to 18 tokens, 165 in all: one job batch, cut by padded size into two passes.
    assert held.shapes[0] == (1, 3) and len(held.shapes) == 3
    assert sum(rows for rows, _ in held.shapes[1:]) == 15 and all(
        rows * width <= 200 for rows, width in held.shapes
    )
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_work_of_a_client_that_has_gone_is_given_up(model):
    with server_thread(model) as server, HeldModel(model) as held, ThreadPoolExecutor(1) as pool:
        first = pool.submit(prompt_logprobs, server, [3, 4, 5])
        held.started.wait(timeout=60)
        body = json.dumps(
            {"model": "tiny", "prompt": [3] * 40, "prompt_logprobs": 0, "max_tokens": 0}
        ).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            wait_for(lambda: len(server.worker._waiting) == 1, seconds=30)
        threading.Event().wait(
            2.5
        )  # the server looks once a second whether a client is still there
        held.go.set()
        first.result()
        prompt_logprobs(server, [3, 4])
    assert held.shapes == [(1, 3), (1, 2)]


def test_generation_ends_when_its_client_has_gone(model):
    with server_thread(model) as server, HeldModel(model) as held:
        body = json.dumps(
            {"model": "tiny", "prompt": [3, 4], "max_tokens": 40, "temperature": 1.0}
        ).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            held.started.wait(timeout=60)
        threading.Event().wait(
            2.5
        )  # the server looks once a second whether a client is still there
        held.go.set()
        prompt_logprobs(server, [3, 4, 5])
    assert held.shapes[0] == (1, 2) and held.shapes[-1] == (1, 3) and len(held.shapes) <= 3


def test_a_request_for_a_score_alone_generates_nothing(model):
    with server_thread(model) as server, HeldModel(model) as held:
        held.go.set()
        (choice,) = server.completions(
            model="tiny", prompt=PROMPTS[0], prompt_logprobs=0, max_tokens=1
        )
    assert held.shapes == [(1, 5)] and choice["text"] == ""


def test_a_failure_ends_its_request_only(model):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory: tried to allocate\nmuch")

    with server_thread(model) as server:
        handle = model.model.base_model.register_forward_pre_hook(fail)
        status, answer = server.ask(
            "POST", "/v1/completions", {"model": "tiny", "prompt": [3, 4], "prompt_logprobs": 0}
        )
        handle.remove()
        assert status == 500 and answer["error"]["message"].endswith(
            "out of memory: tried to allocate"
        )
        assert server.is_healthy()
        assert prompt_logprobs(server, [3, 4]) == pytest.approx(
            given(reference(model, [3, 4]), [3, 4]), abs=1e-5
        )


def test_top_tokens_never_hold_all_logits():
    model = tiny_language_model(vocab_size=8192, max_position_embeddings=1024)
    scorer = Scorer(model, temperature=1.0, tokens_per_batch=1024)
    with LargestTensor() as largest:
        score_with_top(scorer, random_tokens(1024)[0], 5)
    assert largest.num_elements == 2**22 < 1023 * 8192


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "'tiny' is"),
        ({"model": 3}, 400, "model: input should be a valid string."),
        ({"prompt": []}, 400, "prompt must be a text, token ids, or a list"),
        ({"prompt": [[3], []]}, 400, "a prompt has no tokens"),
        ({"prompt": [3, -1]}, 400, "no id negative"),
        ({"prompt": [3, 1.5]}, 400, "prompt must be"),
        ({"prompt": [3, "w4"]}, 400, "prompt must be"),
        (
            {"prompt": [3, VOCABULARY]},
            400,
            "token id 64 is out of the model's vocabulary of 64 tokens.",
        ),
        (
            {"prompt": [3] * 60, "max_tokens": 5},
            400,
            "a prompt of 60 tokens and max_tokens 5 are more than the context of 64",
        ),
        ({"prompt": [[3]] * 1025}, 400, "1025 prompts are more than the 1024"),
        (
            {"prompt": [[3] * 62] * 1000, "prompt_logprobs": 64, "max_tokens": 0},
            400,
            "more than 500000",
        ),
        ({"max_tokens": -1}, 400, "max_tokens: "),
        (
            {"prompt_logprobs": 65},
            400,
            "prompt_logprobs: input should be less than or equal to 64.",
        ),
        ({"logprobs": "all"}, 400, "logprobs: input should be a valid integer."),
        ({"temperature": -1}, 400, "temperature: "),
        ({"temperature": "warm"}, 400, "temperature: input should be a valid number."),
        ({"top_p": 0.9}, 400, "top_p: input should be 1."),
        ({"stream": True}, 400, "stream: input should be False."),
        ({"n": 2}, 400, "n: input should be 1."),
        ({"beam_width": 4}, 400, "'beam_width' is not understood"),
    ],
)
def test_refused_with_one_sentence(server, change, status, words):
    answered, answer = server.ask(
        "POST", "/v1/completions", {"model": "tiny", "prompt": [3, 4], **change}
    )
    assert (answered, answer["error"]["code"]) == (status, status)
    message = answer["error"]["message"]
    assert words in message and "\n" not in message and message.endswith(".")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": "tiny", "temperature": NaN}'],
)
def test_what_is_no_request(server, body):
    status, answer = server.ask("POST", "/v1/completions", body)
    assert status == 400 and answer["error"]["message"]


def test_the_longest_text_fits(server):
    assert server.completions(model="tiny", prompt=[3] * 60, max_tokens=4)[0]["finish_reason"]


def test_large_requests_are_refused_while_they_come(server):
    """Also without Content-Length: an endless body must not fill the memory."""
    body = {"model": "tiny", "prompt": [3, 4], "user": "x" * 2**20}
    status, answer = server.ask("POST", "/v1/completions", body)
    assert (
        status == 413
        and "larger than 1 MiB" in answer["error"]["message"]
        and "--max-request-mib" in answer["error"]["message"]
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as endless:
        endless.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        try:
            while sent < 64:
                endless.sendall(b"20000\r\n" + b"x" * 0x20000 + b"\r\n")
                sent += 1
        except OSError:  # the server hung up
            pass
        endless.settimeout(5)
        try:
            answer = endless.recv(100)
        except OSError:
            answer = b"HTTP/1.1 413"
    assert answer.startswith(b"HTTP/1.1 413") and sent < 64
    assert server.is_healthy()


def test_key(model):
    body = {"model": "tiny", "prompt": [3, 4], "prompt_logprobs": 0}
    with server_thread(model, api_key="sesame") as server:
        assert server.ask("GET", "/health", Authorization="")[0] == 200
        for wrong in (
            "",
            "Bearer ",
            "sesame",
            "Bearer sesam",
            "Bearer sesamee",
            "Basic sesame",
            "Bearer s\xe9same",
        ):
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions")):
                status, answer = server.ask(method, path, body, Authorization=wrong)
                assert status == 401 and "Authorization: Bearer KEY" in answer["error"]["message"]
                assert "sesame" not in json.dumps(answer)
        assert server.ask("GET", "/v1/models")[0] == 200
        assert server.ask("POST", "/v1/completions", body)[0] == 200


def test_models_and_what_is_not_there(server, model):
    status, answer = server.ask("GET", "/v1/models")
    (row,) = answer["data"]
    assert status == 200 and (row["id"], row["root"], row["max_model_len"]) == (
        "tiny",
        model.name,
        64,
    )
    assert (
        server.ask("GET", "/v1/nothing")[0] == 404
        and server.ask("GET", "/v1/completions")[0] == 405
    )
    assert server.ask("GET", "/docs")[0] == 404


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_with_a_served_teacher_equals_one_with_a_local(world, tmp_path):
    port, rollout = free_port(), {"temperature": 0.8, "max_prompt_tokens": 16}
    command = [
        sys.executable,
        "-m",
        "rlad",
        "serve-teacher",
        str(world / "teacher"),
        "--engine",
        "rlad",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(
        [*command, "--served-name", "it"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert (
            process.stdout is not None and process.stdout.readline() == "ready. In your config:\n"
        )
        section = tomllib.loads("".join(process.stdout.readline() for _ in range(4)))["teacher"]
        assert section == {"type": "served", "urls": [f"http://127.0.0.1:{port}/v1"], "model": "it"}
        served = rlad.train(
            run_config(world, tmp_path / "served", teacher=section, rollout=rollout)
        )
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "rlad: interrupted\n")
    local = rlad.train(run_config(world, tmp_path / "local", rollout=rollout))
    for ours, theirs in zip(
        *(RunDirectory(run.run_dir).read("metrics.jsonl") for run in (served, local)), strict=True
    ):
        for name in ("teacher/log_ratio/mean", "loss", "optimization/grad_norm"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
        assert any(name.startswith("teacher/log_ratio") for name in theirs)


def test_mistakes_end_in_one_sentence(world, monkeypatch):
    teacher = world / "teacher"
    monkeypatch.delenv("RLAD_TEACHER_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rlad_fails("serve-teacher", teacher, "--engine", "rlad", "--port", port)
        assert f"port {port} of 127.0.0.1 is in use" in message
    assert "cannot be found or read" in rlad_fails(
        "serve-teacher", world / "nothing", "--engine", "rlad"
    )
    assert "cannot listen on" in rlad_fails(
        "serve-teacher", teacher, "--engine", "rlad", "--host", "127.0.0.1.5", "--without-key"
    )
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        message = rlad_fails("serve-teacher", teacher, "--engine", "rlad", "--host", host)
        assert "can be reached from other machines" in message and "--without-key" in message
    monkeypatch.setenv("RLAD_TEACHER_API_KEY", "two words")
    assert "RLAD_TEACHER_API_KEY holds spaces" in rlad_fails(
        "serve-teacher", teacher, "--engine", "rlad"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'rlad[serve]'" in rlad_fails("serve-teacher", teacher)
    assert "vllm is not installed" in rlad_fails("serve-teacher", teacher, "--engine", "vllm")


def test_vllm_command_keeps_the_key_to_itself(world):
    options = ServeOptions(model="embedded/teacher", tokens_per_batch=4096, max_context_tokens=2048)
    command = vllm_command(options, 8123, is_cpu=True)
    assert (
        command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        and "--enforce-eager" in command
    )
    flags = dict(zip(command[3::2], command[4::2], strict=False))
    assert (
        Path(flags["--model"], "config.json").exists()
        and flags["--served-model-name"] == "embedded/teacher"
    )
    assert (flags["--host"], flags["--port"], flags["--dtype"]) == ("127.0.0.1", "8123", "float32")
    assert (flags["--max-num-batched-tokens"], flags["--max-model-len"]) == ("4096", "2048")
    assert (flags["--logprobs-mode"], flags["--generation-config"]) == ("raw_logprobs", "vllm")
    environment = vllm_environment({"A": "b"}, "secret", is_cpu=True)
    assert environment.pop("VLLM_API_KEY") == "secret" and "secret" not in " ".join(command)
    assert environment == {
        "A": "b",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    assert "--enforce-eager" not in vllm_command(options, 8123, is_cpu=False)
