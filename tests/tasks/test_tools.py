import json

import pytest

from rlad.errors import UserError
from rlad.tasks import SPLITS, make_task
from rlad.tasks.base import Verdict
from rlad.tasks.tools import describe_tools, read_tool_calls, tool_methods
from tool_environments import Counter

PATH = "tool_environments:Counter"


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def task():
    made = make_task("environment", path=PATH, max_turns=4)
    yield made
    made.close()


def test_public_methods_are_tools_and_the_system_message_shows_them(task):
    assert list(tool_methods(Counter)) == ["add", "look"]
    for split in SPLITS:
        problem = task.problem(split, 1)
        (system, tools), (user, first) = problem.messages
        assert (system, user) == ("system", "user") and first == problem.prompt
        assert first == f"Count to {problem.metadata['number'] % 5 + 1}."
        assert tools == describe_tools(Counter)
    schemas = [json.loads(line) for line in tools.splitlines() if line.startswith('{"type"')]
    assert [one["function"]["name"] for one in schemas] == ["add", "look"]
    amount = schemas[0]["function"]["parameters"]["properties"]["amount"]
    assert amount == {"type": "integer", "description": "how much to add"}


def test_an_episode_of_tool_calls(task):
    problem = task.problem("train", 0)
    goal = problem.metadata["number"] % 5 + 1
    environment = task.episode_rules.make()
    assert environment.reset(problem, seed=0) == problem.prompt
    steps = [
        environment.step("First I look. " + call("look") + call("add", amount=goal - 1)),
        environment.step(call("add", amount=-1) + call("fly")),
        environment.step(call("add", amount=1)),
        environment.step("Done."),
    ]
    environment.close()
    assert [step.text for step in steps] == [
        "<tool_response>\n{'count': 0}\n</tool_response>\n"
        f"<tool_response>\nThe counter is at {goal - 1}.\n</tool_response>",
        "<tool_response>\n{'error': 'only upwards'}\n</tool_response>\n"
        "<tool_response>\n{'error': 'Tool fly not found.'}\n</tool_response>",
        f"<tool_response>\nThe counter is at {goal}.\n</tool_response>",
        "",
    ]
    assert [(step.reward, step.done) for step in steps] == [
        (0, False), (0, False), (1, False), (1, True),
    ]  # fmt: skip
    # Not their sum; and an episode that is cut off has the reward of its last turn.
    assert task.episode_rules.judge(steps).reward == 1
    assert task.episode_rules.judge(steps[:2]).verdict is Verdict.WRONG


@pytest.mark.parametrize(
    "text",
    ["Done.", "<tool_call>{", "<tool_call>[1]</tool_call>", '<tool_call>{"name": 1}</tool_call>'],
)
def test_a_turn_without_a_whole_call_ends_the_episode(text, task):
    assert read_tool_calls(text) == []
    environment = task.episode_rules.make()
    environment.reset(task.problem("train", 0), seed=0)
    assert environment.step(text).done
    environment.close()


def test_a_turn_with_one_malformed_call_has_none():
    assert read_tool_calls(call("look") + "<tool_call>no</tool_call>") == []
    assert read_tool_calls('<tool_call>{"name": "look"}</tool_call>') == [("look", {})]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("Untyped", "the tool wait of Untyped cannot be described"), ("NoTools", "has no tools")],
)
def test_a_class_without_usable_tools_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        make_task("environment", path=f"tool_environments:{name}")
