"""Who writes the skills of a run, and what becomes of the run when nobody does."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chat_servers import ChatServer, serving
from rlad.config.file import parse_config
from rlad.engines.native.loop import NativeEngine
from rlad.errors import RunFailedError, UserError
from rlad.models.student import load_student
from rlad.training.run import make_engine
from tiny_environments import Adding, InThisProcess
from tiny_runs import run_config

WRITTEN = "What worked: 1\nWhat went wrong: 2\nIdeal workflow: 1 2"


def config_of(world: Path, teacher: dict[str, Any], **skill: Any) -> Any:
    table = run_config(
        world,
        Path("unused"),
        objective={"type": "opd"},
        rollout={"max_completion_tokens": 9},
        task={},
    )
    table["task"] = {"type": "environment", "path": "tiny_environments:Adding"}
    context = {"without_success": "plain", "skill": skill}
    table["teacher"] = {"type": "privileged", "teacher": teacher, "context": context}
    return parse_config(table)


@contextmanager
def engine_of(config: Any) -> Iterator[NativeEngine]:
    task = InThisProcess(Adding, max_turn_tokens=3)
    engine = make_engine(config, load_student(config), task, before_work=lambda: None)
    assert isinstance(engine, NativeEngine)
    with closing(engine):
        yield engine


def local(world: Path) -> dict[str, Any]:
    return {"type": "local", "model": str(world / "teacher")}


@pytest.mark.parametrize("summariser", ["student", "teacher"])
def test_the_model_that_is_named_writes(world: Path, summariser: str):
    with engine_of(config_of(world, local(world), summariser=summariser)) as engine:
        with engine.summariser.at_work(engine.sampler) as summarise:
            writer: Any = summarise
            teacher: Any = engine.teacher
            models = {"student": engine.student, "teacher": teacher.teacher.language_model}
            assert writer._model is models[summariser]
        steps = engine.steps()
        first, second = next(steps), next(steps)
    assert first.skills and len(first.skills["new"]) == 1
    assert second.skills and second.skills["chosen"]


def test_only_a_local_teacher_writes():
    teacher = {"type": "ema", "update_rate": 1.0, "every_batches": 1}
    with pytest.raises(UserError, match="'local', which can write, but this one is the student"):
        config_of(Path(), teacher, summariser="teacher")


def test_a_server_that_goes_down_ends_the_run_before_the_batch_changes_anything(world: Path):
    chat = ChatServer(text=WRITTEN)
    endpoint = {
        "urls": [chat.url],
        "model": "tiny",
        "num_retries": 0,
        "retry_pause_seconds": 0.01,
    }
    config = config_of(world, local(world), summariser="endpoint", endpoint=endpoint)
    with (
        pytest.raises(UserError, match="the summariser's server does not answer"),
        engine_of(config),
    ):
        pass
    with serving(chat), engine_of(config) as engine:
        # A resumed run may find it elsewhere.
        assert engine.teacher is not None and chat.url not in engine.teacher.identity
        first = next(engine.steps())
        assert first.skills and first.skills["new"][0]["workflow"] == "1 2"
        assert engine.skills is not None
        before = engine.skills.to_json()
        chat.failures = [503]
        with pytest.raises(RunFailedError, match=r"start it again, .* then resume the run"):
            next(engine.steps())
        assert engine.skills.to_json() == before
        second = next(engine.steps())
        assert second.skills and second.skills["chosen"][0]["num_chosen"] == 4
