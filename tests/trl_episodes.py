"""TRL's trainers with a model that says what a script says, so that it calls tools."""

from pathlib import Path
from typing import Any

import trl
from trl.chat_template_utils import add_response_schema
from trl.trainer.grpo_trainer import GRPOTrainer

from rlad.engines.trl.trainer import RLADTrainer
from rlad.models.loading import load_language_model

TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
END = "<|im_end|>"
_CALL = '<tool_call>\n{{"name": "{}", "arguments": {{{}}}}}\n</tool_call>'


def call(name: str, arguments: str = "") -> str:
    """Write a call of a tool as Qwen's models do."""
    return _CALL.format(name, arguments)


def add(amount: int) -> str:
    return call("add", f'"amount": {amount}')


def tool_student() -> tuple[Any, Any]:
    """The embedded student with the template and the end of Qwen's models, and its tokenizer."""
    loaded = load_language_model("embedded/student")
    tokenizer = loaded.tokenizer
    # Its text of bytes can be told anything; the marks of the template are its tokens besides.
    tokenizer.add_tokens(["<|im_start|>", END], special_tokens=True)
    tokenizer.eos_token = END
    tokenizer.chat_template = TEMPLATE.read_text()
    loaded.model.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
    loaded.model.config.max_position_embeddings = 4096  # a token is a byte
    return loaded.model, add_response_schema(tokenizer)


class _Scripted:
    """Completion i says `scripts[i]`, turn after turn; all but the last turn call a tool."""

    scripts: list[list[str]]
    _under_way: list[int]
    _turn = 0

    def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **named: Any) -> Any:
        whole: Any = self
        if "num_generations" not in named:  # the first turn of all
            self._under_way = list(range(len(self.scripts)))
            self._turn = 0
        else:
            self._under_way = [i for i in self._under_way if len(self.scripts[i]) > self._turn]
        turns = [self.scripts[i][self._turn] + END for i in self._under_way]
        assert len(turns) == len(prompt_ids)
        self._turn += 1
        return [whole.processing_class(turn)["input_ids"] for turn in turns], None


class ScriptedGRPO(_Scripted, GRPOTrainer):
    """TRL's own trainer."""


class ScriptedRLAD(_Scripted, RLADTrainer):
    """Ours."""
