"""The tokens between two turns of a model: what the chat template writes after a turn, with the
environment's reply, up to where the next turn begins.

Tokens in, tokens out: what was written is never tokenised again. So a template must write earlier
turns as they were written; one that leaves their thoughts out would make another conversation.
"""

from transformers import PreTrainedTokenizerBase

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.rollouts.prompts import Prompt, chat_messages, chat_text, is_plain
from rlad.rollouts.texts import written_thought
from rlad.tasks import Task
from rlad.tasks.episodes import episode_rules

_TURN = "rlad-turn-7c1f"
"""stands for what the model wrote; no template holds it"""
_PROBES = ("First.", "<think>\nFirst.\n</think>\n\nThen.")
_PROBED_REPLY = "Reply."


class TurnTemplate:
    """Continues conversations as a tokenizer's chat template does; without one, by the reply as it
    is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rollout: RolloutConfig):
        self._tokenizer = tokenizer
        self._rollout = rollout
        self._is_plain = is_plain(tokenizer, rollout.prompt_format)

    def reply_ids(
        self, prompt: Prompt, reply: str, last_token: int, *, has_ended: bool
    ) -> list[int]:
        """Return what comes between a turn, which ends with `last_token`, and the next one.

        `has_ended`: that is an end token; else the turn was cut off, and the template ends it.
        """
        text = reply if self._is_plain else self._after_turn(prompt, reply)
        if has_ended and not self._is_plain:
            # The end token is there already, as the student wrote it.
            before, end, after = text.partition(str(self._tokenizer.decode([last_token])))
            text = after if end and not before.strip() else text
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _after_turn(self, prompt: Prompt, reply: str) -> str:
        _, _, after = self._text(prompt, (_TURN, reply)).rpartition(_TURN)
        return after

    def _text(self, prompt: Prompt, later: tuple[str, ...]) -> str:
        """The conversation with later messages, the model's and the environment's in turn."""
        messages = chat_messages(prompt, self._rollout.system_prompt)
        for number, content in enumerate(later):
            messages.append({"role": "user" if number % 2 else "assistant", "content": content})
        return chat_text(self._tokenizer, messages, self._rollout.chat_template_kwargs)

    def require_prefix(self, prompt: Prompt) -> None:
        """Raise `UserError` unless each conversation is the beginning of the one that continues it;
        or settings keep what was written all the same."""
        if self._is_plain or self._rollout.rewritten_turns == "keep":
            return
        if not all(self._keeps(prompt, probe) for probe in _PROBES):
            raise UserError(
                "the chat template of the student's tokenizer writes earlier turns in another way "
                "than the student wrote them (without their thoughts, for example), and what it "
                "wrote is not tokenised again; set rollout.rewritten_turns = 'keep', with which "
                "earlier turns stay as they were written, or take another template."
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
    """Raise `UserError` where a task is of episodes and the student's chat template cannot continue
    them; see `TurnTemplate.require_prefix`."""
    if episode_rules(task) is not None:
        TurnTemplate(tokenizer, rollout).require_prefix(task.problem("train", 0).asked)
