"""The bank of skills: what was learnt from earlier episodes, in three fields, to show to a teacher.

choice = an untried skill first, else argmax of mean reward + c sqrt(ln N / n)

n counts the choices of a skill, N those of its bank; the reward of a choice is the mean of the
group for which it was made (the paper does not say what updates it).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from rlad.config.context import SkillConfig
from rlad.rollouts.types import Metrics, Rollout, RolloutGroup
from rlad.tasks import Problem, Verdict
from rlad.tasks.answers import outside_thoughts

_FIELDS = ("worked", "went_wrong", "workflow")
TITLES = dict(zip(_FIELDS, ("What worked", "What went wrong", "Ideal workflow"), strict=True))


@dataclass(slots=True)
class Skill:
    """A skill of one bank, with its rewards so far."""

    bank: str
    number: int
    worked: str
    went_wrong: str
    workflow: str
    num_chosen: int = 0
    num_rewards: int = 0
    total_reward: float = 0.0

    @property
    def text(self) -> str:
        fields = [(TITLES[name], getattr(self, name)) for name in _FIELDS]
        return "\n".join(f"{title}: {text}" for title, text in fields if text)

    @property
    def mean_reward(self) -> float:
        return self.total_reward / self.num_rewards if self.num_rewards else 0.0


Fields = dict[str, str]
"""The three fields of a skill, by name."""
Summarise = Callable[[RolloutGroup], Fields]


class SkillBank:
    """All skills of a run. A rollout batch changes a copy made by `draft`; the run adopts the copy
    once the batch is complete."""

    def __init__(self, settings: SkillConfig):
        self.settings = settings
        self.skills: list[Skill] = []

    def draft(self) -> Self:
        return copy.deepcopy(self)

    def bank_of(self, problem: Problem) -> str:
        names = {"task": problem.task, "difficulty": problem.difficulty, "problem": problem.key}
        return names[self.settings.per]

    def choose(self, problem: Problem) -> Skill | None:
        """Choose a skill for a problem, and count the choice; None if its bank is empty."""
        bank = self.bank_of(problem)
        candidates = [skill for skill in self.skills if skill.bank == bank]
        if not candidates:
            return None
        total = sum(skill.num_chosen for skill in candidates)

        def upper_bound(skill: Skill) -> float:
            if not skill.num_chosen:
                return math.inf
            width = math.sqrt(math.log(total) / skill.num_chosen)
            return skill.mean_reward + self.settings.exploration * width

        chosen = max(candidates, key=upper_bound)  # ties go to the oldest
        chosen.num_chosen += 1
        return chosen

    def learn(
        self,
        groups: Sequence[RolloutGroup],
        chosen: Sequence[Skill | None],
        summarise: Summarise,
    ) -> list[Skill]:
        """Reward the skills that were chosen for the groups. Write a new one for each bank from the
        most informative group: one with successes and failures, if there is one."""
        for group, skill in zip(groups, chosen, strict=True):
            rewards = [one.reward for one in group.rollouts if math.isfinite(one.reward)]
            if skill is not None and rewards:
                skill.num_rewards += 1
                skill.total_reward += sum(rewards) / len(rewards)
        by_bank: dict[str, RolloutGroup] = {}
        for group in groups:
            bank = self.bank_of(group.problem)
            if bank not in by_bank or _shows(group) > _shows(by_bank[bank]):
                by_bank[bank] = group
        return list(self._written(by_bank, summarise))

    def _written(self, by_bank: dict[str, RolloutGroup], summarise: Summarise) -> Iterator[Skill]:
        for bank, group in by_bank.items():
            fields = {
                name: text[: self.settings.max_characters]
                for name, text in summarise(group).items()
            }
            number = 1 + max((one.number for one in self.skills), default=-1)
            skill = Skill(bank, number, fields["worked"], fields["went_wrong"], fields["workflow"])
            own = [one for one in self.skills if one.bank == bank]
            if not skill.text or any(one.text == skill.text for one in own):
                continue
            if len(own) == self.settings.max_skills:
                tried = [one for one in own if one.num_chosen] or own
                self.skills.remove(min(tried, key=lambda one: one.mean_reward))
            self.skills.append(skill)
            yield skill

    # --- storing ----------------------------------------------------------------------------------

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(skill) for skill in self.skills]

    def load(self, rows: Sequence[dict[str, Any]]) -> None:
        """Load what `to_json` returned."""
        self.skills = [Skill(**row) for row in rows]

    def metrics(self) -> Metrics:
        tries = [skill.num_chosen for skill in self.skills]
        return {
            "teacher/skills/count": float(len(tries)),
            "teacher/skill_tries/max": float(max(tries, default=0)),
        }


def record(chosen: Sequence[Skill | None], new: Sequence[Skill]) -> dict[str, Any]:
    """Return the row of `skills.jsonl` for a rollout batch: the skills chosen for its groups, in
    their state after the batch, and the new ones."""
    once = {skill.number: skill for skill in chosen if skill is not None}
    shown = ("bank", "number", "num_chosen", "mean_reward")
    return {
        "chosen": [{key: getattr(one, key) for key in shown} for one in once.values()],
        "new": [asdict(skill) for skill in new],
    }


def _shows(group: RolloutGroup) -> int:
    """Rank how informative a group is: successes and failures, only successes, or only failures."""
    is_correct = [rollout.verdict == Verdict.CORRECT for rollout in group.rollouts]
    return 2 * any(is_correct) + (not all(is_correct))


# --- the summary by rules -------------------------------------------------------------------------


def summarise_by_rules(group: RolloutGroup) -> Fields:
    """Quote the episodes of a group: how the best one began, how the worst one ended, and what the
    shortest success did."""
    successes = [one for one in group.rollouts if one.verdict == Verdict.CORRECT]
    failures = [one for one in group.rollouts if one.verdict == Verdict.WRONG]
    fields: Fields = dict.fromkeys(_FIELDS, "")
    if successes:
        shortest = min(successes, key=lambda one: (_num_turns(one), len(one.text)))
        fields["worked"] = (
            f"{len(successes)} of {len(group.rollouts)} attempts succeeded, the shortest in "
            f"{_count(_num_turns(shortest), 'turn')}."
        )
        fields["workflow"] = " / ".join(_said(shortest))
    if failures:
        worst = min(failures, key=lambda one: one.reward)
        fields["went_wrong"] = (
            f"{len(failures)} of {len(group.rollouts)} failed; one {_end_of(worst)} after "
            f"{_count(_num_turns(worst), 'turn')}, the last of them: {_said(worst)[-1]}"
        )
        if worst.feedback:
            fields["went_wrong"] += f" ({worst.feedback})"
    return fields


def _num_turns(rollout: Rollout) -> int:
    return max(len(rollout.turns), 1)


def _said(rollout: Rollout) -> list[str]:
    texts = [turn.text for turn in rollout.turns] or [rollout.text]
    return [" ".join(outside_thoughts(text).split()) for text in texts]


def _end_of(rollout: Rollout) -> str:
    return {
        "turns": "ran out of turns",
        "tokens": "wrote too much",
        "context": "filled the context",
    }.get(rollout.completion.ending or "", "ended without success")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
