"""Skills that a model on a server writes: what it is asked, what is read, and what is said when it
does not answer."""

from collections.abc import Iterator
from typing import Any

import pytest

from chat_servers import ChatServer, serving
from rlad.config.context import SkillConfig, SkillEndpointConfig
from rlad.errors import RunFailedError, UserError
from rlad.rollouts.skill_endpoint import EndpointWriter
from rlad.rollouts.skills import summarise_by_rules
from rlad.rollouts.types import Completion, Rollout, RolloutGroup
from rlad.tasks import Problem

WRITTEN = (
    "<think>Well.</think>**What worked:** going left.\nWhat went wrong: up.\nIdeal workflow: left"
)
FIELDS = {"worked": "going left.", "went_wrong": "up.", "workflow": "left"}


def rollout(reward: float, text: str) -> Rollout:
    verdict = "correct" if reward == 1 else "wrong"
    return Rollout(Completion((1,), (0.0,), False), text, verdict, reward)


GROUP = RolloutGroup(
    0, Problem("Where is it?", "", "a"), (1,), (rollout(1, "left"), rollout(0, "up"))
)


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with serving(ChatServer(text=WRITTEN)) as server:
        yield server


def writer(chat: ChatServer, before_work: Any = lambda: None, **settings: Any) -> EndpointWriter:
    quick = {"num_retries": 1, "retry_pause_seconds": 0.01, "timeout_seconds": 5.0}
    config = SkillEndpointConfig(urls=(chat.url,), model="tiny", **quick | settings)
    return EndpointWriter(config, before_work)


def test_a_model_is_shown_both_attempts_and_its_fields_are_read(chat, monkeypatch):
    monkeypatch.setenv("RLAD_SUMMARISER_API_KEY", "secret")
    assert writer(chat, max_tokens=99)(GROUP) == FIELDS
    ((path, headers, body),) = chat.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 99, 0.0)
    (message,) = body["messages"]
    assert message["role"] == "user"
    for text in ("Where is it?", "succeeded (1 turns, reward 1):\nleft", "failed (1 turns", "\nup"):
        assert text in message["content"]


@pytest.mark.parametrize("text", ["I do not know.", "", None])
def test_without_the_fields_it_is_the_summary_by_rules(chat, text):
    chat.text = text
    assert writer(chat)(GROUP) == summarise_by_rules(GROUP)


def test_long_attempts_are_shown_from_their_end(chat):
    long = rollout(1, "x" * 500 + "the end")
    writer(chat, max_attempt_characters=20)(RolloutGroup(0, GROUP.problem, (1,), (long,)))
    assert "\n" + "x" * 13 + "the end" in chat.asked[0][2]["messages"][0]["content"]


def test_attempts_have_no_pictures_of_their_own(chat):
    seen = rollout(1, "a <im<image>age>cat")
    writer(chat)(RolloutGroup(0, GROUP.problem, (1,), (seen,)))
    assert chat.asked[0][2]["messages"][0]["content"].endswith("a cat")


def test_what_passes_is_waited_for(chat):
    chat.failures = [503]
    assert writer(chat)(GROUP) == FIELDS


def test_a_server_that_is_down_is_named_and_the_run_can_be_resumed():
    with pytest.raises(RunFailedError, match=r"127.0.0.1:\d+/v1/chat.*start it again.*then resume"):
        writer(ChatServer())(GROUP)
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/v1/chat.*summariser = 'rules'"):
        writer(ChatServer()).require_answer()


def test_a_refusal_says_what_the_server_said(chat):
    writer(chat).require_answer()
    assert chat.asked[0][2]["max_tokens"] == 1
    chat.failures = [404, 404]
    with pytest.raises(UserError, match=r"404: the model `tiny` does not exist.*urls.*model"):
        writer(chat).require_answer()
    with pytest.raises(RunFailedError, match=r"refuses the summariser's requests \(HTTP 404"):
        writer(chat)(GROUP)


def test_the_run_may_be_stopped_while_it_waits():
    class Stopped(Exception):
        pass

    looks: list[int] = []

    def before_work() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        writer(ChatServer(), before_work, num_retries=9, retry_pause_seconds=30.0)(GROUP)


def test_settings_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="needs a section endpoint"):
        SkillConfig(summariser="endpoint")
    endpoint = SkillEndpointConfig(urls=("http://127.0.0.1:1/v1",), model="tiny")
    with pytest.raises(ValueError, match="summariser is 'rules'"):
        SkillConfig(endpoint=endpoint)
