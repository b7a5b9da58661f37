"""One class, played by rlad and by TRL: the same prompt, calls, replies and rewards."""

from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the optional package trl")

import torch
from datasets import Dataset
from trl.chat_template_utils import parse_response
from trl.trainer.grpo_config import GRPOConfig

from rlad.tasks import make_task
from rlad.tasks.episodes import episode_rules
from rlad.tasks.tools import describe_tools, read_tool_calls
from tool_environments import Counter
from trl_episodes import END, ScriptedGRPO, add, call, tool_student
from trl_runs import ARGUMENTS

pytestmark = pytest.mark.trl

TURNS = [add(2) + "\n" + call("fly"), add(-1), "Done."]


@pytest.fixture(scope="module")
def student() -> Any:
    return tool_student()


def test_the_system_message_is_that_of_qwens_template(student):
    _, tokenizer = student
    user = {"role": "user", "content": "Count to 3."}
    counter = Counter()
    theirs = tokenizer.apply_chat_template(
        [user], tools=[counter.add, counter.look], tokenize=False, add_generation_prompt=True
    )
    system = {"role": "system", "content": describe_tools(Counter)}
    ours = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    assert ours == theirs


@pytest.mark.parametrize("turn", [*TURNS, "<tool_call>\n{\n</tool_call>"])
def test_calls_are_read_as_trl_reads_them(turn, student):
    _, tokenizer = student
    parsed = parse_response(tokenizer, tokenizer(turn + END)["input_ids"], prefix=[])
    theirs = [call["function"] for call in parsed.get("tool_calls") or []]
    assert read_tool_calls(turn) == [(one["name"], one["arguments"]) for one in theirs]


def test_an_episode_is_the_same_in_both(student, tmp_path):
    model, tokenizer = student
    rows = [{"prompt": [{"role": "user", "content": ""}], "number": 6}] * 4
    arguments: dict[str, Any] = ARGUMENTS | {
        "max_completion_length": 1024,
        "gradient_accumulation_steps": 1,
    }
    trainer = ScriptedGRPO(
        model,
        args=GRPOConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=Counter,
    )
    trainer.scripts = [TURNS] * 4
    played = trainer._generate_and_score_completions(rows)
    (first, *_) = tokenizer.batch_decode(played["completion_ids"])
    logged = trainer._logs["rewards"]["Counter"]

    task = make_task("environment", path="tool_environments:Counter")
    rules = episode_rules(task)
    assert rules is not None
    environment = rules.make()
    problem = task.problem("train", 0)
    problem = type(problem)("", "", "", metadata={"number": 6})
    assert environment.reset(problem, seed=0) == "Count to 2."
    steps = [environment.step(turn) for turn in TURNS]
    task.close()
    for step in steps[:2]:
        assert f"<|im_start|>user\n{step.text}{END}" in first
    assert list(logged) == [rules.judge(steps).reward] * 4 == [1.0] * 4
    assert torch.equal(
        (played["completion_mask"] * played["tool_mask"]).sum(-1),
        torch.full((4,), sum(len(tokenizer(turn + END)["input_ids"]) for turn in TURNS)),
    )
