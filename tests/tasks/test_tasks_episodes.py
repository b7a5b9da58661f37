import math

import pytest

from rlad.errors import UserError
from rlad.tasks import SPLITS, make_task
from rlad.tasks.base import Verdict
from rlad.tasks.episodes import EpisodeFailed, EpisodeRules, Step, checked_step, episode_rules
from tiny_environments import Adding


def test_an_environments_problems_are_addressed_and_begin_with_its_first_text():
    task = make_task("environment", path="tiny_environments:Adding", options={"num_rounds": 2})
    keys = set()
    for split in SPLITS:
        problem = task.problem(split, 3, seed=1)
        assert problem == task.problem(split, 3, seed=1)
        assert problem.prompt == Adding().reset(problem, seed=0)
        keys.add(problem.key)
    assert len(keys) == 3
    rules = episode_rules(task)
    assert rules is not None
    environment = rules.make()
    assert environment.reset(problem, seed=0) == problem.prompt
    first = environment.step("the answer is 9")
    assert (first.reward, first.done) == (0.0, False)
    assert environment.step("").done


def test_a_problem_of_the_users_keeps_its_conversation():
    path = "tiny_environments:AddingInConversation"
    problem = make_task("environment", path=path).problem("train", 0)
    assert problem.messages == (("system", "Be brief."), ("user", problem.prompt))


def test_an_episodes_reward_is_the_sum_or_the_last_and_decides_success():
    steps = [Step("", 0.25), Step("", 0.5), Step("", 0.25, done=True)]
    total = EpisodeRules(Adding).judge(steps)
    assert (total.reward, total.verdict) == (1.0, Verdict.CORRECT)
    last = EpisodeRules(Adding, reward="last").judge(steps)
    assert (last.reward, last.verdict) == (0.25, Verdict.WRONG)
    assert EpisodeRules(Adding, success_reward=0.9).judge(steps[:2]).verdict is Verdict.WRONG
    said = Step("", 0.0, True, {"success": True, "feedback": "slow"})
    assert EpisodeRules(Adding).judge([said]).verdict is Verdict.CORRECT
    lost = Step("", 0.0, True, {"success": False, "feedback": "slow"})
    assert EpisodeRules(Adding).judge([lost]).feedback == "slow"
    assert EpisodeRules(Adding).judge([]).verdict is Verdict.CANNOT_JUDGE


@pytest.mark.parametrize(
    "value",
    [None, ("", 1.0, True), ("", math.nan, True, {}), ("", 1.0, "no", {}), (1, 1.0, True, {})],
)
def test_what_is_no_step_costs_the_episode(value):
    with pytest.raises(EpisodeFailed):
        checked_step(value)


@pytest.mark.parametrize(
    "path", ["nowhere:Class", "tiny_environments", "tiny_environments:train_numbers"]
)
def test_a_path_that_names_no_environment_is_one_sentence(path):
    with pytest.raises(UserError, match="environment"):
        make_task("environment", path=path)
