"""One class, played by rlad and by TRL: the same prompt, calls, replies and rewards."""

from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="needs the optional package trl")

import torch
from datasets import Dataset
from trl.chat_template_utils import add_response_schema, parse_response
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rlad.models.loading import load_language_model
from rlad.tasks import make_task
from rlad.tasks.episodes import episode_rules
from rlad.tasks.tools import describe_tools, read_tool_calls
from tool_environments import Counter
from trl_runs import ARGUMENTS

pytestmark = pytest.mark.trl

TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
CALL = '<tool_call>\n{{"name": "{}", "arguments": {{{}}}}}\n</tool_call>'
TURNS = [
    CALL.format("add", '"amount": 2') + "\n" + CALL.format("fly", ""),
    CALL.format("add", '"amount": -1'),
    "Done.",
]
END = "<|im_end|>"


@pytest.fixture(scope="module")
def student() -> Any:
    loaded = load_language_model("embedded/student")
    tokenizer = loaded.tokenizer
    # Its text of bytes can be told anything; the marks of the template are its tokens besides.
    tokenizer.add_tokens(["<|im_start|>", END], special_tokens=True)
    tokenizer.eos_token = END
    tokenizer.chat_template = TEMPLATE.read_text()
    loaded.model.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
    loaded.model.config.max_position_embeddings = 4096  # a token is a byte
    return loaded.model, add_response_schema(tokenizer)


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


class Scripted(GRPOTrainer):
    """A trainer whose model says what the script says, turn after turn."""

    num_turns = 0

    def _generate_single_turn(self, prompt_ids, *arguments: Any, **named: Any) -> Any:
        turn = TURNS[self.num_turns] + END
        self.num_turns += 1
        tokenizer: Any = self.processing_class
        return [tokenizer(turn)["input_ids"] for _ in prompt_ids], None


def test_an_episode_is_the_same_in_both(student, tmp_path):
    model, tokenizer = student
    rows = [{"prompt": [{"role": "user", "content": ""}], "number": 6}] * 4
    arguments: dict[str, Any] = ARGUMENTS | {
        "max_completion_length": 1024,
        "gradient_accumulation_steps": 1,
    }
    trainer = Scripted(
        model,
        args=GRPOConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=Counter,
    )
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
