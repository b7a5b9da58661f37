"""Environments with TRL's interface: a plain class whose public methods are the model's tools. The
same class can be used here and as TRL's `environment_factory`.

    class Counter:
        def reset(self, **row) -> str: ...
        def add(self, amount: int) -> str:
            '''Add to the counter.

            Args:
                amount: what to add
            '''
        def get_reward(self) -> float: ...

Tools are described and called in the format of Hermes and of Qwen's templates, in the words of
Qwen's template. A turn without a call ends the episode.
"""

import asyncio
import inspect
import json
import re
from collections.abc import Callable
from types import MethodType
from typing import Any

from rlad.errors import UserError
from rlad.tasks.base import Problem
from rlad.tasks.episodes import EpisodeFailed, Step

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def has_tools(environment: type) -> bool:
    """Return whether a class has TRL's interface. Its `step` is then a tool like any other."""
    return hasattr(environment, "get_reward")


def tool_methods(environment: type) -> dict[str, Callable[..., Any]]:
    """List the methods of a class that are tools, as TRL does: all public ones except `reset` and
    `get_reward`."""
    found = dict(inspect.getmembers(environment, inspect.isfunction))
    return {
        name: method
        for name, method in found.items()
        if name not in ("reset", "get_reward") and not name.startswith("_")
    }


def describe_tools(environment: type) -> str:
    """Write the system message that describes a class's tools. Raises `UserError` if a tool lacks
    types or a docstring."""
    from transformers.utils.chat_template_utils import get_json_schema

    schemas = []
    for name, method in tool_methods(environment).items():
        try:
            schemas.append(get_json_schema(MethodType(method, object())))
        except Exception as error:  # its exceptions have no common base class
            raise UserError(
                f"the tool {name} of {environment.__name__} cannot be described ({error}); give "
                "its arguments types, and its docstring a line for each under 'Args:'."
            ) from error
    if not schemas:
        raise UserError(
            f"{environment.__name__} has no tools: it needs a public method besides reset and "
            "get_reward, or reset(problem, seed) and step(text)."
        )
    return _INTRODUCTION.format(tools="\n".join(json.dumps(schema) for schema in schemas))


def read_tool_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Read the calls, (name, arguments), in a turn; an empty list if any is malformed."""
    calls = []
    for written in _CALL.findall(text):
        try:
            call = json.loads(written)
        except (ValueError, RecursionError):
            return []
        match call:
            case {"name": str(name), "arguments": dict() | None as arguments}:
                calls.append((name, arguments or {}))
            case {"name": str(name)}:
                calls.append((name, {}))
            case _:
                return []
    return calls


class ToolEnvironment:
    """An environment made from an object with TRL's interface.

    After each turn the reward is what `get_reward` returns. A truncated episode has the reward of
    its last turn.
    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self._tools = tool_methods(type(environment))

    def reset(self, problem: Problem, *, seed: int) -> str:
        text = self._environment.reset(**problem.metadata)
        if text is None:
            raise EpisodeFailed("reset returned no text for the model to read")
        return text

    def step(self, text: str) -> Step:
        calls = read_tool_calls(text)
        replies = [f"<tool_response>\n{self._call(*call)}\n</tool_response>" for call in calls]
        reward = _awaited(self._environment.get_reward())
        return Step("\n".join(replies), reward, done=not calls)

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        try:
            if name not in self._tools:
                raise ValueError(f"Tool {name} not found.")
            return str(_awaited(self._tools[name](self._environment, **arguments)))
        except Exception as error:  # as in TRL, the model reads the error
            return str({"error": str(error)})


def _awaited(value: Any) -> Any:
    async def wait() -> Any:
        return await value

    return asyncio.run(wait()) if inspect.isawaitable(value) else value
