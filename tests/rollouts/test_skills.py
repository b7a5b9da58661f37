"""The bank of skills: which is chosen, what it learns, what is written down."""

import math

import pytest

from rlad.config.context import SkillConfig
from rlad.config.run import RolloutConfig
from rlad.rollouts.sampling import OwnSampler
from rlad.rollouts.skill_writer import SkillWriter, read_fields
from rlad.rollouts.skills import SkillBank, record, summarise_by_rules
from rlad.rollouts.types import Completion, Rollout, RolloutGroup, Turn
from rlad.tasks import Problem
from tiny_models import tiny_language_model


def rollout(reward: float, *texts: str) -> Rollout:
    turns = tuple(Turn(text, "go on", 0.0) for text in texts)
    completion = Completion((1,), (0.0,), False, (True,), "turns" if reward < 1 else "done")
    verdict = "correct" if reward == 1 else "wrong"
    return Rollout(completion, " ".join(texts), verdict, reward, turns=turns)


def group(*rollouts: Rollout, key: str = "a") -> RolloutGroup:
    return RolloutGroup(0, Problem("?", "", key), (1,), rollouts)


MIXED = group(rollout(1, "up", "left"), rollout(1, "left"), rollout(0, "down", "down"))


def test_a_skill_quotes_the_shortest_success_and_the_worst_failure():
    fields = summarise_by_rules(MIXED)
    assert fields == {
        "worked": "2 of 3 attempts succeeded, the shortest in 1 turn.",
        "went_wrong": "1 of 3 failed; one ran out of turns after 2 turns, the last of them: down",
        "workflow": "left",
    }
    assert summarise_by_rules(group(rollout(1, "up")))["went_wrong"] == ""
    assert summarise_by_rules(group(rollout(0, "up")))["workflow"] == ""


def test_a_skill_quotes_no_thoughts():
    fields = summarise_by_rules(group(rollout(1, "<think>up? left.</think> left", "so</think> up")))
    assert fields["workflow"] == "left / up"


def test_untried_ones_first_then_by_their_upper_bound():
    """Means 1 and 0 after one try each, N = 2: 1 + sqrt(2 ln 2) against sqrt(2 ln 2): the first. At
    n = 4 and 1, N = 5: 1 + sqrt(2 ln 5 / 4) = 1.897 against sqrt(2 ln 5) = 1.794; at n = 5, N = 6:
    1.847 against 1.893: the second."""
    bank = SkillBank(SkillConfig())
    problem = MIXED.problem
    assert bank.choose(problem) is None
    bank.learn([MIXED], [None], summarise_by_rules)
    bank.learn([group(rollout(0, "down"))], [None], summarise_by_rules)
    first = bank.choose(problem)
    second = bank.choose(problem)
    assert first and second and (first.number, second.number) == (0, 1)
    first.num_rewards, first.total_reward = 1, 1.0
    second.num_rewards = 1
    for _ in range(4):
        assert bank.choose(problem) is first
        first.num_rewards += 1
        first.total_reward += 1
    assert (first.num_chosen, bank.choose(problem)) == (5, second)


def test_it_learns_from_the_group_that_shows_most_and_rewards_what_was_chosen():
    bank = SkillBank(SkillConfig())
    new = bank.learn([group(rollout(0, "down")), MIXED], [None, None], summarise_by_rules)
    assert [skill.workflow for skill in new] == ["left"]
    chosen = bank.choose(MIXED.problem)
    unjudged = group(rollout(math.nan, "?"))
    assert bank.learn([MIXED, unjudged], [chosen, chosen], summarise_by_rules) == []
    assert chosen is not None
    assert (chosen.num_rewards, chosen.mean_reward) == (1, pytest.approx(2 / 3))
    assert record([chosen, None], [])["chosen"] == [
        {"bank": "", "number": 0, "num_chosen": 1, "mean_reward": pytest.approx(2 / 3)}
    ]


def test_a_bank_of_its_own_for_each_problem_and_a_full_one_loses_its_worst():
    bank = SkillBank(SkillConfig(per="problem", max_skills=2))
    for text in ("up", "left", "right"):
        for key in "ab":
            made = bank.learn([group(rollout(0, text), key=key)], [None], summarise_by_rules)
            assert len(made) == 1
    assert [skill.bank for skill in bank.skills] == ["a", "b", "a", "b"]
    other = SkillBank(bank.settings)
    other.load(bank.to_json())
    assert other.skills == bank.skills
    draft = other.draft()
    draft.choose(MIXED.problem)
    assert other.skills == bank.skills


def test_its_fields_are_bounded():
    bank = SkillBank(SkillConfig(max_characters=10))
    (skill,) = bank.learn([MIXED], [None], summarise_by_rules)
    assert len(skill.went_wrong) == 10


def test_the_students_own_words_are_read_by_their_titles():
    text = "Well. **What worked:** to go left.\n\nIdeal workflow: left,\nthen up."
    assert read_fields(text) == {
        "worked": "to go left.",
        "went_wrong": "",
        "workflow": "left,\nthen up.",
    }
    assert not any(read_fields("I do not know").values())


def test_what_the_student_writes_without_fields_is_replaced_by_rules():
    student = tiny_language_model()
    rollout_config = RolloutConfig(max_completion_tokens=8, prompt_format="plain")
    writer = SkillWriter(student, OwnSampler(student, rollout_config), rollout_config, lambda: None)
    assert writer(MIXED) == summarise_by_rules(MIXED)
