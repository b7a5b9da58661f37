"""A vLLM server in another process as the sampler of a run: what it writes is the student's, after
every update, when it is killed, and one batch ahead.

Needs an environment with vLLM and rlad (`.ci/vllm-environment`), whose Python `RLAD_VLLM_PYTHON`
names.
"""

import itertools
import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rlad
from rlad.errors import RunFailedError, UserError
from rlad.rollouts import vllm_server as module
from rlad.runs.directory import RunDirectory
from running_servers import free_port
from vllm_servers import (
    CONTEXT,
    FLAGS,
    PROMPTS,
    REMEDY,
    TEMPERATURE,
    VLLM_PYTHON,
    distances,
    kill,
    move,
    sampler_at,
    tied_student,
    vllm_server,
    written,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not VLLM_PYTHON,
        reason="set RLAD_VLLM_PYTHON to what `.ci/vllm-environment DIRECTORY` prints",
    ),
]
NUM_UPDATES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "student"
    model = tied_student()
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Server:
    port: int
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    port = free_port()
    with vllm_server(folder, port, *FLAGS, *REMEDY) as process:
        yield Server(port, process)


@pytest.fixture(scope="module")
def port(server: Server) -> int:
    return server.port


def test_its_logprobs_are_those_of_the_trainer_after_every_update(port) -> None:
    model = tied_student()
    with closing(sampler_at(port, model)) as sampler:
        found: list[float] = []
        for _ in range(NUM_UPDATES):
            move(model)
            sampler.weights_changed()
            found += distances(model, written(sampler))
        assert len(found) > 2000
        assert sum(found) / len(found) < 1e-5 and max(found) < 1e-3
        # Each completion has a seed of its own.
        assert written(sampler) == written(sampler) != written(sampler, seed=2)
        order: list[int] = []
        groups = written(
            sampler,
            group_size=3,
            num_tokens=6,
            after_group=lambda number, group: order.append(number),
        )
        likeliest = written(sampler, temperature=0.0)
    # Every group is handed on once, whole, with one completion for each place.
    assert sorted(order) == [0, 1, 2]
    for group in groups:
        assert len(group) == 3
        for one in group:
            *before, last = one.token_ids
            assert len(one.logprobs) == len(one.token_ids) <= 6
            assert not {1, 2} & set(before)  # the end tokens
            assert one.is_truncated == (last not in (1, 2))
    assert [len({one.token_ids for one in group}) for group in likeliest] == [1, 1, 1]


def test_what_was_begun_is_written_with_the_weights_of_then(port) -> None:
    model = tied_student()
    settings: dict[str, Any] = {"group_size": 8, "temperature": TEMPERATURE}
    with closing(sampler_at(port, model)) as sampler:
        move(model)
        sampler.weights_changed()
        wanted = written(sampler, seed=3)
        sampler.begin(PROMPTS, seed=3, max_completion_tokens=24, **settings)
        move(model)
        sampler.weights_changed()
        # Others are written by the student as it is; those that were begun have come before.
        assert max(distances(model, written(sampler, seed=4))) < 1e-3
        found = written(sampler, seed=3)
        assert [[one.token_ids for one in group] for group in found] == [
            [one.token_ids for one in group] for group in wanted
        ]
        assert max(distances(model, found)) > 0.1


def test_a_server_that_cannot_write_for_a_student_is_refused(port, monkeypatch, tmp_path) -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("takes 128 tokens", {}, {"max_completion_tokens": CONTEXT}),
        ("embeddings of (64, 128), but the student's are (64, 64)", {"hidden_size": 64}, {}),
        ("it computes another model", {"num_hidden_layers": 1}, {}),
        ("computes in float32, but the student in bfloat16", {"dtype": torch.bfloat16}, {}),
        ("cannot be written", {}, {"vllm": {"weights_directory": str(tmp_path / "none")}}),
    ]
    for sentence, shape, settings in cases:
        with pytest.raises(UserError) as error:
            sampler_at(port, tied_student(**shape), **settings)
        assert sentence in str(error.value)
    # A proxy is not asked about what is on this machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    sampler_at(port, tied_student()).close()


@pytest.fixture(scope="module")
def second(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    copy = tmp_path_factory.mktemp("second") / "student"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.log"))
    port = free_port()
    with vllm_server(copy, port, *FLAGS, *REMEDY) as process:
        yield Server(port, process)


def test_two_servers_share_the_groups_and_one_stands_in_for_the_other(port, second, caplog) -> None:
    urls = [f"http://127.0.0.1:{one}" for one in (port, second.port)]
    model = tied_student()
    settings: dict[str, Any] = {"num_tokens": 100, "group_size": 64}
    with closing(sampler_at(port, model, vllm={"urls": urls, "num_retries": 3})) as sampler:
        writers: Counter[str] = Counter()
        read = sampler._read

        def count(prompt: Any, num_completions: int, url: str, answer: Any) -> Any:
            writers[url] += 1
            return read(prompt, num_completions, url, answer)

        sampler._read = count
        # Both are given every update; whoever writes a prompt, its completions are in its place.
        for _ in range(3):
            move(model)
            sampler.weights_changed()
            wanted = written(sampler)
            assert max(distances(model, wanted)) < 1e-3
            given = [sampler._client.ask_once(url, "/weight_info") for url in urls]
            assert [one["weight_version"] for one in given] == [sampler._version] * 2
        assert set(writers) == set(urls) and min(writers.values()) >= 6
        with closing(sampler_at(port, model)) as alone:
            assert same_share(written(alone), wanted) > 0.9
        # This one had its turn with the first server; each run gives it its own weights again.
        assert max(distances(model, written(sampler))) < 1e-3

        # The second one is killed while it writes.
        looks = itertools.count()

        def kill_it() -> None:
            if next(looks) == 1:
                kill(second.process)

        writers.clear()
        found = written(sampler, before_token=kill_it, **settings)
        assert [len(group) for group in found] == [64] * 3
        assert max(distances(model, found)) < 1e-3
        assert writers[urls[0]] == 3
        assert f"does not answer, waiting for it: {urls[1]}/inference" in caplog.text
        move(model)
        sampler.weights_changed()
        assert max(distances(model, written(sampler))) < 1e-3
    # When a run begins, all must be up.
    with pytest.raises(UserError, match=rf"no vLLM server answers \({urls[1]}/version"):
        sampler_at(port, model, vllm={"urls": urls})


def same_share(groups: list[Any], others: list[Any]) -> float:
    """The share of completions with the same tokens as those in their place."""
    same = [
        one.token_ids == other.token_ids
        for group, other_group in zip(groups, others, strict=True)
        for one, other in zip(group, other_group, strict=True)
    ]
    return sum(same) / len(same)


def run_config_of(folder: Path, port: int, **rollout: Any) -> dict[str, Any]:
    teacher = tied_student(seed=1)
    teacher.model.save_pretrained(folder / "teacher")
    teacher.tokenizer.save_pretrained(folder / "teacher")
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "answer": "w3"} for i in range(3, 40)]
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": {"model": str(folder)},
        "teacher": {"model": str(folder / "teacher")},
        "task": {"type": "jsonl", "path": str(problems), "verifier": "exact"},
        "rollout": {
            "engine": "vllm",
            "vllm": {"urls": [f"http://127.0.0.1:{port}"]},
            "prompts_per_batch": 4,
            "group_size": 4,
            "max_prompt_tokens": 16,
            "max_completion_tokens": 12,
            "max_batch_rows": 16,
            **rollout,
        },
        "optimization": {"num_steps": 4, "learning_rate": 1e-3},
        "objective": {"type": "opd"},
        "evaluation": {"every_steps": 2, "num_validation_problems": 4, "num_test_problems": 4},
    }


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_with_a_server_ends_and_resumes(port, folder, tmp_path, max_staleness) -> None:
    config = run_config_of(folder, port, max_staleness=max_staleness)
    config["run_dir"] = str(tmp_path / "run")
    for num_steps in (3, 4):
        config["optimization"]["num_steps"] = num_steps
        rlad.train(config, resume=num_steps == 4)
    run = RunDirectory(tmp_path / "run")
    rows = list(run.read("metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    mismatches = [row["sampler/mismatch/mean"] for row in rows]
    if max_staleness:
        # The last one is the first of a resumed run.
        assert [row["rollout/staleness/steps"] for row in rows] == [0, 1, 1, 0]
        assert max(mismatches[1:3]) > 1e-4
    else:
        assert max(mismatches) < 1e-5
    assert mismatches[0] < 1e-5 and mismatches[3] < 1e-5
    # Ahead they are handed over for the next batch, and the last one of a run has none.
    handed_over = ["time/hand_over/seconds" in row for row in rows[1:3]]
    assert handed_over == [True, not max_staleness]
    assert json.loads((run.path / "run.json").read_text())["sampler"] == "vllm"
    assert not [name for name in os.listdir(run.path) if "weights" in name]


# --- the server of the tests above is killed ------------------------------------------------------


def test_a_server_that_is_killed_and_started_again_writes_for_the_student(server, folder) -> None:
    """It comes back with other weights than the student's, which its completions say."""
    model = tied_student()
    sampler = sampler_at(server.port, model, vllm={"num_retries": 60})
    for _ in range(3):
        move(model)
    sampler.weights_changed()
    settings: dict[str, Any] = {"num_tokens": 100, "group_size": 64}
    wanted = written(sampler, **settings)
    num_looks = 0
    killed = threading.Event()
    done = threading.Event()

    def kill_it() -> None:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 2:  # it writes since a fifth of a second
            kill(server.process)
            killed.set()

    def start_again() -> None:
        killed.wait(600)
        with vllm_server(folder, server.port, *FLAGS, *REMEDY):
            done.wait(600)

    again = threading.Thread(target=start_again)
    again.start()
    try:
        found = written(sampler, before_token=kill_it, **settings)
    finally:
        killed.set()
        done.set()
        again.join()
    assert max(distances(model, found)) < 1e-3
    assert same_share(found, wanted) > 0.9

    # Now it is down.
    sampler._client.settings = sampler._client.settings.model_copy(update={"num_retries": 1})
    with pytest.raises(RunFailedError, match=r"no vLLM server writes.*then resume the run"):
        written(sampler)
    sampler.weights_changed()
    with pytest.raises(RunFailedError, match=r"no vLLM server takes the weights"):
        written(sampler)
    sampler.close()
    with pytest.raises(UserError, match=r"no vLLM server answers .*start it by `VLLM_SERVER_DEV"):
        sampler_at(server.port, model)


def test_without_the_remedy_stale_weights_stop_the_run(folder, monkeypatch) -> None:
    """vLLM 0.32 keeps an old output layer of tied embeddings on the CPU."""
    model = tied_student()
    port = free_port()
    with vllm_server(folder, port, *FLAGS):
        with pytest.raises(UserError, match=r"start it with --worker-extension-cls rlad\.rollouts"):
            sampler_at(port, model)
        needs = module.Needs.of
        monkeypatch.setattr(
            module.Needs, "of", lambda *asked: replace(needs(*asked), is_tied=False)
        )
        with closing(sampler_at(port, model)) as sampler:
            move(model)
            sampler.weights_changed()
            with pytest.raises(RunFailedError, match="does not sample from the student's weights"):
                written(sampler)
