"""The tokens between two turns of a model: the chat template's text after a turn, with the
environment's reply, up to the beginning of the next turn.

What was sampled is never tokenised again. So a template must reproduce earlier turns as they were
written. A template that omits their thoughts would make another conversation.
"""

from transformers import PreTrainedTokenizerBase

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.rollouts.prompts import Prompt, chat_messages, chat_text, is_plain
from rlad.rollouts.texts import written_thought
from rlad.tasks import Task
from rlad.tasks.episodes import episode_rules

_TURN = "rlad-turn-7c1f"
"""A placeholder for the model's text that occurs in no template."""
_PROBES = ("First.", "<think>\nFirst.\n</think>\n\nThen.")
_PROBED_REPLY = "Reply."


class TurnTemplate:
    """The continuation of conversations by a tokenizer's chat template or, without one, by the
    plain reply."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rollout: RolloutConfig):
        self._tokenizer = tokenizer
        self._rollout = rollout
        self._is_plain = is_plain(tokenizer, rollout.prompt_format)

    def reply_ids(
        self, prompt: Prompt, reply: str, last_token: int, *, has_ended: bool
    ) -> list[int]:
        """Return the tokens between a turn, which ends with `last_token`, and the next one.

        `has_ended`: this is an end token. Otherwise the turn was cut off, and the template ends it.
        """
        text = reply if self._is_plain else self._after_turn(prompt, reply)
        if has_ended and not self._is_plain:
            # The student has already written the end token.
            before, end, after = text.partition(str(self._tokenizer.decode([last_token])))
            text = after if end and not before.strip() else text
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _after_turn(self, prompt: Prompt, reply: str) -> str:
        _, _, after = self._text(prompt, (_TURN, reply)).rpartition(_TURN)
        return after

    def _text(self, prompt: Prompt, later: tuple[str, ...]) -> str:
        """Format the conversation with later messages, alternately of model and environment."""
        messages = chat_messages(prompt, self._rollout.system_prompt)
        for number, content in enumerate(later):
            messages.append({"role": "user" if number % 2 else "assistant", "content": content})
        return chat_text(self._tokenizer, messages, self._rollout.chat_template_kwargs)

    def require_prefix(self, prompt: Prompt) -> None:
        """Raise `UserError` unless each conversation is a prefix of the one that continues it, or
        the settings keep turns as written."""
        if self._is_plain or self._rollout.rewritten_turns == "keep":
            return
        if not all(self._keeps(prompt, probe) for probe in _PROBES):
            raise UserError(
                "the chat template of the student's tokenizer changes earlier turns (it may remove "
                "their thoughts, for example), but the student's tokens are not tokenised again; "
                "set rollout.rewritten_turns = 'keep' to keep earlier turns as written, or use "
                "another template."
            )

    def _keeps(self, prompt: Prompt, probe: str) -> bool:
        first = self._text(prompt, ())
        begun = written_thought(first)
        said = probe.removeprefix(begun)
        turn = begun + said
        second = self._text(prompt, (turn, _PROBED_REPLY))
        third = self._text(prompt, (turn, _PROBED_REPLY, turn, _PROBED_REPLY))
        return second.startswith(first + said) and third.startswith(second + said)


def require_continuable_prompts(
    task: Task, tokenizer: PreTrainedTokenizerBase, rollout: RolloutConfig
) -> None:
    """Raise `UserError` if a task has episodes that the student's chat template cannot continue;
    see `TurnTemplate.require_prefix`."""
    if episode_rules(task) is not None:
        TurnTemplate(tokenizer, rollout).require_prefix(task.problem("train", 0).asked)
