"""A served teacher with a prompt of its own: what it is shown fits into the server's context."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance_server import ConformanceServer
from rlad.config.file import parse_config
from rlad.config.teacher import PrivilegedTeacherConfig
from rlad.models.loading import load_language_model
from rlad.models.student import load_student
from rlad.models.without_weights import load_tokenizer
from rlad.rollouts.types import Completion, Rollout
from rlad.tasks import Problem
from rlad.teachers import build_teacher, check_teacher, setting_of
from rlad.teachers.base import Setting, TeacherRequest
from rlad.teachers.local import LocalTeacher
from rlad.teachers.privileged import PrivilegedTeacher, make_blocks, teacher_context
from tiny_runs import run_config


def with_peers(server: ConformanceServer) -> dict[str, Any]:
    shows = {"num_successes": 1, "without_success": "plain"}
    served = {"type": "served", "urls": [server.url], "model": "tiny", "tolerance": 1e-3}
    return {"type": "privileged", "context": shows, "teacher": served}


def test_what_a_server_is_shown_fits_into_its_context(world: Path) -> None:
    """Of 62 tokens 1 is for what it writes. A question of 4 tokens and a request of 8, a completion
    of 4, and a heading of 3 leave 42 for a solution of 60, which is cut; with the local teacher of
    the same context it is the same prompt, and the same scores."""
    model = load_language_model(str(world / "teacher"))
    right = Rollout(Completion((), (), False), "0 1 " * 30, "correct", 1.0)
    problem = Problem("1 + 1 =", "2", "k")
    request = TeacherRequest((3, 4), (2, 3, 4, 1), problem, peers=(right,))
    with ConformanceServer(model, context=62) as server:
        config = run_config(world, Path("unused"), rollout={"max_prompt_tokens": 4})
        config = parse_config(config | {"teacher": with_peers(server)})
        setting = setting_of(config, load_student(config))
        assert teacher_context(config.teacher, setting) == 61
        with closing(build_teacher(config.teacher, setting)) as teacher:
            (values,) = teacher.logprobs([request])
            metrics = teacher.pop_metrics()
    assert bool(values.isfinite().all())
    assert metrics["teacher/shortened/frac"] == 1 == metrics["teacher/privileged/frac"]
    settings = config.teacher
    assert isinstance(settings, PrivilegedTeacherConfig) and settings.context is not None
    local = LocalTeacher(model, temperature=1.0, tokens_per_batch=100)
    blocks = make_blocks(settings.context, settings, setting)
    other = PrivilegedTeacher(local, "{prompt}", encode=list, context=61, blocks=blocks)
    torch.testing.assert_close(values, other.logprobs([request])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("context", "level"), [(16, "error"), (17, "warning"), (23, "warning"), (24, "ok")]
)
def test_the_check_knows_the_context_of_a_server(world: Path, context: int, level: str) -> None:
    """The bare prompt with its completion needs 16 tokens, with a solution 23."""
    model = load_language_model(str(world / "teacher"))
    with ConformanceServer(model, context=context) as server:
        config = run_config(world, Path("unused"), rollout={"max_prompt_tokens": 4})
        config |= {"teacher": with_peers(server)}
        run = parse_config(config)
        setting = Setting(run, load_tokenizer(run.student.model), 256)
        found = {one.subject: one for one in check_teacher(run.teacher, setting)}
    assert found["privileged context"].level == level, found
