"""Drawn scenes: exact answers, what is to be seen, splits, and what is won without looking."""

import pytest

from rlad.tasks import SPLITS, make_task
from rlad.tasks.base import split_of
from rlad.tasks.scenes import (
    COLOURS,
    Thing,
    blind_accuracy,
    draw_scene,
    model_answer,
    seen_in,
    sees_rightly,
)

KINDS = ("count", "colour", "difference", "two steps")


def test_the_model_answer_is_right_and_sees_rightly():
    task = make_task("scenes", reward="perception_and_answer")
    for split in SPLITS:
        for index in range(12):
            problem = task.problem(split, index)
            text = model_answer(problem)
            assert task.judge(problem, text).reward == 1
            assert sees_rightly(problem, text)
            assert problem.difficulty == KINDS[index % 4]
            assert split_of(problem.key) == split
            assert problem == task.problem(split, index)


def test_answers_follow_from_what_is_seen():
    """The answer is worked out once more from the perception's words."""
    task = make_task("scenes", instructions=False)
    for index in range(60):
        problem = task.problem("train", index)
        things = [thing.split() for thing in problem.metadata["perception"].split(", ")]
        words = problem.question.replace("<image>", "").rstrip("?\n").split()
        if problem.difficulty == "count":
            answer = sum(shape + "s" == words[2] for _, _, shape in things)
        elif problem.difficulty == "colour":
            (answer,) = (colour for size, colour, _ in things if size == words[5])
        elif problem.difficulty == "difference":
            colours = [colour for _, colour, _ in things]
            answer = colours.count(words[3]) - colours.count(words[5])
        else:
            size = words[words.index("only") + 1]
            (named,) = (colour for one, colour, _ in things if one == size)
            answer = sum(colour == named for _, colour, _ in things)
        assert problem.answer == str(answer), problem


def test_the_picture_shows_what_the_scene_holds():
    import random

    scene = (Thing(0, "large", "red", "circle"), Thing(3, "small", "blue", "square"))
    image = draw_scene(scene, 64, random.Random(0)).image()
    counts = {colour: n for n, colour in image.getcolors()}
    assert set(counts) == {COLOURS["red"], COLOURS["blue"], (205, 205, 205)}
    # Centres are within 30 % of the free room of their places.
    assert image.getpixel((16, 16)) == COLOURS["red"]
    assert image.getpixel((48, 48)) == COLOURS["blue"]
    assert counts[COLOURS["red"]] > 3 * counts[COLOURS["blue"]]


def test_pictures_can_be_black_and_all_else_the_same():
    one, other = (make_task("scenes", shown=shown).problem("test", 3) for shown in (True, False))
    assert (one.prompt, one.answer, one.key) == (other.prompt, other.answer, other.key)
    assert other.images[0].image().getcolors() == [(64 * 64, (0, 0, 0))]
    assert one.images[0].image().size == other.images[0].image().size


def test_a_wrong_perception_costs_half_of_that_reward():
    problem = make_task("scenes").problem("train", 0)
    text = f"<perception>large red circle</perception><answer>{problem.answer}</answer>"
    saw = problem.metadata["perception"] == "large red circle"
    assert not saw
    assert make_task("scenes").judge(problem, text).reward == 1
    both = make_task("scenes", reward="perception_and_answer")
    judgement = both.judge(problem, text)
    assert (judgement.verdict, judgement.reward) == ("correct", 0.5)
    wrong = both.judge(problem, "<answer>seven</answer>")
    assert (wrong.verdict, wrong.reward) == ("wrong", 0)
    assert wrong.feedback == "The shapes are not named as they are in the picture."
    assert seen_in("<perception>a</perception><perception>b</perception>") is None


@pytest.mark.parametrize("kind", KINDS)
def test_little_is_to_be_won_without_the_picture(kind):
    task = make_task("scenes", kinds=[kind], instructions=False)
    chance = {"count": 1 / 4, "colour": 1 / 6, "difference": 1 / 3, "two steps": 1 / 3}[kind]
    assert abs(blind_accuracy(task, num_problems=150) - chance) < 0.12
