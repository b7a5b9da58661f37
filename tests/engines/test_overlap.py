"""A served teacher is asked while the student writes: the same batch, sooner, and nothing of it
outlives an error."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance_server import ConformanceServer
from rlad.config.file import parse_config
from rlad.engines.native.loop import NativeEngine
from rlad.engines.native.overlap import AskedAhead, covered_seconds
from rlad.engines.rollout_batch import RolloutBatch
from rlad.errors import RunFailedError
from rlad.models.loading import load_language_model
from rlad.models.student import load_student
from rlad.tasks import make_task
from rlad.teachers.served.teacher import ServedTeacher
from rlad.training.run import make_engine
from running_servers import server_thread, wait_for
from tiny_runs import OFTEN_CORRECT, run_config

SHORT = {"tolerance": 1e-3, "retry_pause_seconds": 0.005, "num_retries": 0, "timeout_seconds": 20.0}
NUM_GROUPS = 6
GROUP_SIZE = 4
MAX_TOKENS = 24
Before = Callable[[], None]


@pytest.fixture
def server(world: Path) -> Iterator[ConformanceServer]:
    with ConformanceServer(load_language_model(str(world / "teacher"))) as server:
        yield server


def served(url: str, **settings: Any) -> dict[str, Any]:
    return {"type": "served", "urls": [url], "model": "tiny", **SHORT, **settings}


@contextmanager
def engine_at(
    world: Path,
    teacher: dict[str, Any],
    *,
    before_work: Before = lambda: None,
    max_batch_rows: int = 256,
    **sections: Any,
) -> Iterator[NativeEngine]:
    sizes = {
        "prompts_per_batch": NUM_GROUPS,
        "group_size": GROUP_SIZE,
        "max_completion_tokens": MAX_TOKENS,
    }
    # `opd` asks its teacher about every completion, whatever the verifier says.
    sections.setdefault("objective", {"type": "opd"})
    sections["rollout"] = {**sizes, "max_batch_rows": max_batch_rows}
    # In place of a table of its own: no key of the local teacher may stay.
    config = parse_config(run_config(world, Path("unused"), **sections) | {"teacher": teacher})
    with closing(make_task(**config.task.model_dump())) as task:
        engine = make_engine(config, load_student(config), task, before_work=before_work)
        assert isinstance(engine, NativeEngine)
        with closing(engine):
            yield engine


def batches_of(world: Path, teacher: dict[str, Any], **settings: Any) -> list[RolloutBatch]:
    with engine_at(world, teacher, **settings) as engine:
        return [engine.make_rollout_batch(index) for index in range(2)]


def assert_equal(batch: RolloutBatch, other: RolloutBatch) -> None:
    """To the last bit."""
    assert batch.groups == other.groups and torch.equal(batch.advantages, other.advantages)
    assert batch.teacher_logprobs is not None and other.teacher_logprobs is not None
    for ours, theirs in zip(batch.teacher_logprobs, other.teacher_logprobs, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32
    assert batch.counts == other.counts


# --- the same batch -------------------------------------------------------------------------------


def forms(url: str, folder: Path) -> dict[str, dict[str, Any]]:
    one = served(url)
    template = "{prompt} {answer} {peer_solution}"
    return {
        "served": one,
        "cached": {"type": "cached", "directory": str(folder), "teacher": one},
        "mixture": {
            "type": "several",
            "combine": "mixture",
            "teachers": {"a": one, "b": one},
            "weights": {"a": 2.0},
        },
        "by task": {"type": "several", "combine": "by_task", "teachers": {"jsonl": one}},
        "privileged": {"type": "privileged", "template": template, "teacher": one},
    }


@pytest.mark.parametrize("objective", ["trrd", "opd"])
@pytest.mark.parametrize("form", list(forms("", Path())))
def test_the_batch_is_that_of_asking_afterwards(
    world, tmp_path, server, monkeypatch, form, objective
):
    """TRRD leaves groups of equal rewards out, OPD asks about all."""
    sections: Any = {"max_batch_rows": 10, "objective": {"type": objective}, "task": OFTEN_CORRECT}
    ahead = batches_of(world, forms(server.url, tmp_path / "ahead")[form], **sections)
    num_asked = len(server.requests)
    monkeypatch.setattr(ServedTeacher, "works_elsewhere", False)
    after = batches_of(world, forms(server.url, tmp_path / "after")[form], **sections)
    assert len(server.requests) == 2 * num_asked
    for batch, other in zip(ahead, after, strict=True):
        assert_equal(batch, other)
        assert (
            "teacher/overlap/seconds" in batch.seconds
            and "teacher/overlap/seconds" not in other.seconds
        )
    are_scored = [len(values) > 0 for batch in ahead for values in batch.teacher_logprobs or ()]
    assert any(are_scored) and all(are_scored) == (objective == "opd")


def test_what_a_cache_answers_at_once_can_be_trained_on(world, tmp_path, server):
    """Sampling is in inference mode, of which nothing may stick to what is made between two of its
    tokens."""
    teacher = forms(server.url, tmp_path)["cached"]
    first, second = (batches_of(world, teacher) for _ in range(2))
    for batch, again in zip(first, second, strict=True):
        assert (
            batch.counts.pop("teacher/cache_hits/frac")
            < again.counts.pop("teacher/cache_hits/frac")
            == 1.0
        )
        assert_equal(batch, again)
        assert not any(values.is_inference() for values in again.teacher_logprobs or ())
    with engine_at(world, teacher) as engine:
        assert (
            engine.update(engine.make_rollout_batch(0), range(NUM_GROUPS))[
                "objective/trained_tokens/count"
            ]
            > 0
        )


@pytest.mark.serve
def test_with_the_own_server(world, monkeypatch):
    """It scores together what arrives together: equal to rounding."""
    pytest.importorskip("fastapi", reason="rlad[serve] is not installed")
    with server_thread(
        load_language_model(str(world / "teacher")), max_context_tokens=256
    ) as client:
        ahead = batches_of(world, served(client.url), max_batch_rows=10)
        monkeypatch.setattr(ServedTeacher, "works_elsewhere", False)
        after = batches_of(world, served(client.url), max_batch_rows=10)
    for batch, other in zip(ahead, after, strict=True):
        assert batch.groups == other.groups and batch.teacher_logprobs and other.teacher_logprobs
        for ours, theirs in zip(batch.teacher_logprobs, other.teacher_logprobs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- when it is asked -----------------------------------------------------------------------------


def test_groups_are_scored_while_others_are_written(world, server, monkeypatch):
    """One group is decoded after another; the student waits before each token until what was asked
    is answered."""
    with engine_at(world, served(server.url), max_batch_rows=GROUP_SIZE) as engine:
        answered_at_token: list[int] = []
        num_before = len(server.requests)
        num_asked = 0
        submit = AskedAhead.submit

        def count_asked(self: AskedAhead, number: int, requests: Any) -> None:
            nonlocal num_asked
            submit(self, number, requests)
            num_asked += len(requests)

        def wait_for_answers() -> None:
            wait_for(lambda: len(server.requests) - num_before == num_asked, seconds=20)
            answered_at_token.append(num_asked)

        monkeypatch.setattr(AskedAhead, "submit", count_asked)
        engine.before_work = wait_for_answers
        batch = engine.make_rollout_batch(0)
    scored = [len(values) > 0 for values in batch.teacher_logprobs or ()]
    by_group = [sum(scored[i : i + GROUP_SIZE]) for i in range(0, len(scored), GROUP_SIZE)]
    longest = [
        max(len(rollout.completion.token_ids) for rollout in group.rollouts)
        for group in batch.groups
    ]
    # Before each of a group's tokens, and before each of its rollouts is judged, those of all
    # groups before it are there.
    wanted = [sum(by_group[:g]) for g in range(NUM_GROUPS) for _ in range(longest[g] + GROUP_SIZE)]
    assert answered_at_token[: len(wanted)] == wanted and wanted[-1] > 0
    asked = [tuple(body["prompt"]) for body in server.requests[num_before:]]
    rows = zip(batch.prompts, batch.completions, scored, strict=True)
    assert sorted(asked) == sorted(
        (*prompt, *completion) for prompt, completion, does in rows if does
    )


def test_seconds_are_told_apart(world, server):
    """Slow answers (.3 s each, all at once) behind slow tokens (20 ms each), group after group:
    nearly all are hidden."""
    teacher = served(server.url, max_concurrent_requests=NUM_GROUPS * GROUP_SIZE)
    with engine_at(
        world, teacher, before_work=lambda: time.sleep(0.02), max_batch_rows=GROUP_SIZE
    ) as engine:
        engine.make_rollout_batch(0)
        server.lasting_fault = "slow"
        server.slow_seconds = 0.3
        started = time.monotonic()
        seconds = engine.make_rollout_batch(0).seconds
        total = time.monotonic() - started
    assert 0.3 < seconds["teacher/overlap/seconds"] < total - seconds["time/teacher/seconds"]
    parts = [seconds[f"time/{part}/seconds"] for part in ("generation", "rewards", "teacher")]
    assert 0.9 * total < sum(parts) <= total


def test_covered_seconds_by_hand():
    spans = [(5.0, 9.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (8.0, 20.0)]
    assert covered_seconds(spans, until=100.0) == 3 + 15
    assert covered_seconds(spans, until=6.0) == 3 + 1
    assert covered_seconds(spans, until=4.0) == 3
    assert covered_seconds([], until=1.0) == covered_seconds(spans, until=-1.0) == 0


# --- what goes wrong ------------------------------------------------------------------------------


def num_threads_here() -> int:
    """Without those of the server, each of which is a `process_request_thread`."""
    return sum("process_request" not in thread.name for thread in threading.enumerate())


def test_what_is_missing_is_asked_for_once_more(world, server):
    wanted = batches_of(world, served(server.url))[0]
    with engine_at(world, served(server.url)) as engine:
        num_before = len(server.requests)
        num_rows = sum(len(values) > 0 for values in wanted.teacher_logprobs or ())
        server.faults.extend(["500"] * num_rows)
        assert_equal(engine.make_rollout_batch(0), wanted)
        assert len(server.requests) - num_before == 2 * num_rows
        server.lasting_fault = "500"
        with pytest.raises(
            RunFailedError,
            match=r"step 1: the teacher gave no finite log-prob for 100\.0% of the tokens",
        ):
            engine.make_rollout_batch(0)
        assert len(server.requests) - num_before == 4 * num_rows


def test_a_refusal_ends_the_batch_and_the_threads(world, server):
    with engine_at(world, served(server.url)) as engine:
        num_before = num_threads_here()
        server.lasting_fault = "401"
        with pytest.raises(RunFailedError, match="HTTP 401"):
            engine.make_rollout_batch(0)
        wait_for(lambda: num_threads_here() <= num_before, seconds=5)


class Stopped(Exception):
    """What the tests stop with."""


@pytest.mark.parametrize("fault", ["slow", "401", "dead"])
@pytest.mark.parametrize("when", ["while the student writes", "while it waits"])
def test_stopping_does_not_wait_for_the_teacher(world, server, when, fault, monkeypatch):
    """What stops the run is what is raised, whatever has become of the requests."""
    is_written = False
    num_asked = 0

    def stop() -> None:
        if num_asked and (is_written or when == "while the student writes"):
            time.sleep(0.1)  # the requests are on their way, or refused
            raise Stopped

    patient = {"retry_pause_seconds": 30.0, "num_retries": 5}
    with engine_at(
        world, served(server.url, **patient), before_work=stop, max_batch_rows=GROUP_SIZE
    ) as engine:
        num_before = num_threads_here()
        submit = AskedAhead.submit
        with_advantages = engine.with_advantages

        def count_asked(self: AskedAhead, number: int, requests: Any) -> None:
            nonlocal num_asked
            submit(self, number, requests)
            num_asked += len(requests)

        def notice_the_end(index: int, groups: Any) -> RolloutBatch:
            nonlocal is_written
            is_written = len(groups) == NUM_GROUPS
            return with_advantages(index, groups)

        monkeypatch.setattr(AskedAhead, "submit", count_asked)
        engine.with_advantages = notice_the_end
        server.lasting_fault = "" if fault == "dead" else fault
        server.slow_seconds = 3.0
        if fault == "dead":
            server.kill()
        started = time.monotonic()
        with pytest.raises(Stopped):
            engine.make_rollout_batch(0)
        assert time.monotonic() - started < 2.5 and num_asked > 0
        wait_for(lambda: num_threads_here() <= num_before, seconds=10)
        if fault == "dead":
            server.start()
