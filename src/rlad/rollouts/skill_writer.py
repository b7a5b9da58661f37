"""Skills written by the student or its teacher. The model is shown two episodes of a group and
writes the three fields. A text without the fields is replaced by the summary by rules."""

import re
from collections.abc import Callable, Sequence

from rlad.config.run import RolloutConfig
from rlad.models.loading import LanguageModel
from rlad.models.pictures import without_markers
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.skills import TITLES, Fields, summarise_by_rules
from rlad.rollouts.texts import completion_texts
from rlad.rollouts.types import Rollout, RolloutGroup, Sampler
from rlad.tasks import Verdict
from rlad.tasks.answers import outside_thoughts

_REQUEST = (
    "These are attempts at a task. Write down what can be learnt from them for the next such task, "
    "in three short paragraphs that begin with 'What worked:', 'What went wrong:' and 'Ideal "
    "workflow:'."
)
_MOST_TOKENS = 256
_FEWEST_CHARACTERS = 100


class SkillWriter:
    """The writer of skills that samples greedily from a model in this process."""

    def __init__(
        self,
        model: LanguageModel,
        sampler: Sampler,
        rollout: RolloutConfig,
        before_work: Callable[[], None],
    ):
        self._model = model
        self._sampler = sampler
        self._rollout = rollout
        self._before_work = before_work
        self._max_tokens = min(_MOST_TOKENS, rollout.max_completion_tokens)

    def __call__(self, group: RolloutGroup) -> Fields:
        prompt = self._prompt(group)
        if prompt is None:
            return summarise_by_rules(group)
        ((written,),) = self._sampler.sample(
            [prompt],
            group_size=1,
            max_completion_tokens=self._max_tokens,
            temperature=0.0,
            seed=0,
            before_token=self._before_work,
        )
        (text,) = completion_texts(self._model.tokenizer, [written])
        return fields_or_rules(text, group)

    def _prompt(self, group: RolloutGroup) -> Sequence[int] | None:
        """Make the prompt, with as much of the attempts as fits; None if hardly anything fits."""
        limits = (self._model.context_tokens, self._sampler.max_tokens)
        context = min((one for one in limits if one is not None), default=None)
        most = max(map(len, (one.text for one in _shown(group))), default=0)
        while True:
            text = writing_request(group, most)
            ids = prompt_token_ids(
                self._model.tokenizer,
                text,
                self._rollout,
                group.problem.images,
                self._model.vision,
            )
            if context is None or len(ids) + self._max_tokens <= context:
                return ids
            most //= 2
            if most < _FEWEST_CHARACTERS:
                return None


def writing_request(group: RolloutGroup, max_characters: int) -> str:
    """Make the request to write a skill, with at most `max_characters` of each attempt."""
    # Attempts were written with the pictures, but have none of their own.
    attempts = map(without_markers, _attempts(group, max_characters))
    return "\n\n".join([_REQUEST, group.problem.question, *attempts])


def fields_or_rules(text: str, group: RolloutGroup) -> Fields:
    """Read the fields that a model wrote about a group; if there are none, summarise it by
    rules."""
    fields = read_fields(outside_thoughts(text))
    return fields if any(fields.values()) else summarise_by_rules(group)


def _shown(group: RolloutGroup) -> list[Rollout]:
    """Return the shortest success and the worst failure."""
    successes = [one for one in group.rollouts if one.verdict == Verdict.CORRECT]
    failures = [one for one in group.rollouts if one.verdict == Verdict.WRONG]
    return [
        *([min(successes, key=lambda one: len(one.text))] if successes else []),
        *([min(failures, key=lambda one: one.reward)] if failures else []),
    ]


def _attempts(group: RolloutGroup, max_characters: int) -> list[str]:
    texts = []
    for rollout in _shown(group):
        what = "succeeded" if rollout.verdict == Verdict.CORRECT else "failed"
        turns = max(len(rollout.turns), 1)
        # The end of an attempt says most about it.
        text = rollout.text[-max_characters:]
        texts.append(f"An attempt that {what} ({turns} turns, reward {rollout.reward:g}):\n{text}")
    return texts


def read_fields(text: str) -> Fields:
    """Find the three fields in a text; missing fields are empty."""
    titles = "|".join(map(re.escape, TITLES.values()))
    parts = re.split(rf"[*#\s]*({titles})[*\s]*:[*\s]*", text, flags=re.IGNORECASE)
    # The text before the first title belongs to no field; then titles and texts alternate.
    found = {
        title.casefold(): body.strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {name: found.get(title.casefold(), "") for name, title in TITLES.items()}
