import itertools
import random
import re
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlad.tasks.base import SPLITS, Problem, Verdict, split_of
from rlad.tasks.logic import (
    Claim,
    KnightsAndKnaves,
    Puzzle,
    Statement,
    answer_text,
    logic_rl_reward,
    parse_answer,
    prompt_text,
    random_puzzle,
    solutions,
    structure_key,
)


def says(connective, *claims: tuple[int, bool]) -> Statement:
    return Statement(connective, tuple(Claim(*claim) for claim in claims))


# --- puzzles solved by hand -----------------------------------------------------------------------

HAND_WORKED: list[tuple[Puzzle, list[tuple[bool, ...]]]] = [
    # 0 says that 1 is a knave; 1 says that 0 and 1 are knights. If 0 is a knight, 1 is a knave,
    # whose "both" is false: fits. If 0 is a knave, 1 is a knight, whose "both" would be true:
    # contradiction.
    ((says("is", (1, False)), says("and", (0, True), (1, True))), [(True, False)]),
    # Curry's "if I am a knight then so is 1": were 0 a knave, "if" would be true from a false
    # premise, so 0 is a knight and 1 too; 1 says that 0 is a knight: true.
    ((says("if", (0, True), (1, True)), says("is", (0, True))), [(True, True)]),
    # 0: 1 is a knight if and only if 2 is one. 1: 0 is a knave. 2: 0 is a knight or 1 is a knight.
    # 0 knight: 1 lies, so 1 and 2 are knaves, but 2 speaks the truth. 0 knave: 1 is a knight, 2 is
    # not, but 2 speaks the truth again. No solution.
    (
        (
            says("iff", (1, True), (2, True)),
            says("is", (0, False)),
            says("or", (0, True), (1, True)),
        ),
        [],
    ),
    # The same with "and" for 2, whose statement is now false in both cases: two solutions.
    (
        (
            says("iff", (1, True), (2, True)),
            says("is", (0, False)),
            says("and", (0, True), (1, True)),
        ),
        [(True, False, False), (False, True, False)],
    ),
]


@pytest.mark.parametrize(("puzzle", "worlds"), HAND_WORKED)
def test_solutions_by_hand(puzzle, worlds):
    assert solutions(puzzle) == worlds


@pytest.mark.parametrize(
    ("connective", "table"),
    # Truth over (first, second) = (T, T), (T, F), (F, T), (F, F).
    [("and", "TFFF"), ("or", "TTTF"), ("if", "TFTT"), ("iff", "TFFT")],
)
def test_connectives(connective, table):
    statement = says(connective, (0, True), (1, True))
    worlds = itertools.product((True, False), repeat=2)
    assert "".join("FT"[statement.holds(world)] for world in worlds) == table


def true_in_english(text: str, roles: dict[str, str]) -> bool:
    """An independent reading of the English statement."""
    if text.startswith("if "):
        first, second = text[3:].split(" then ")
        return not true_in_english(first, roles) or true_in_english(second, roles)
    for joint, join in (
        (" if and only if ", bool.__eq__),
        (" and ", bool.__and__),
        (" or ", bool.__or__),
    ):
        first, found, second = text.partition(joint)
        if found:
            return join(true_in_english(first, roles), true_in_english(second, roles))
    name, role = text.split(" is a ")
    return roles[name] == role


@pytest.mark.parametrize("num_people", [2, 3, 4, 5])
def test_the_prompt_has_exactly_the_solution_that_the_answer_says(num_people):
    task = KnightsAndKnaves(num_people=[num_people], instructions=False)
    for index in range(30):
        problem = task.problem("train", index)
        said = dict(re.findall(r"(\w+) says that (.*?)\.(?= |$)", problem.prompt))
        names = problem.metadata["names"]
        assert list(said) == names
        fits = []
        for world in itertools.product(("knight", "knave"), repeat=num_people):
            roles = dict(zip(names, world, strict=True))
            if all(
                true_in_english(said[name], roles) == (roles[name] == "knight") for name in names
            ):
                fits.append(", ".join(f"{name} is a {role}" for name, role in roles.items()))
        assert fits == [problem.answer]


@pytest.mark.parametrize("num_people", range(2, 9))
def test_random_puzzles_have_one_solution_and_nobody_talks_of_strangers(num_people):
    rng = random.Random(num_people)
    for _ in range(10):
        puzzle = random_puzzle(num_people, rng)
        assert len(puzzle) == num_people
        assert len(solutions(puzzle)) == 1
        assert all(
            claim.person in range(num_people) for statement in puzzle for claim in statement.claims
        )


# --- structure ------------------------------------------------------------------------------------


def reordered(puzzle: Puzzle, order: list[int], rng: random.Random) -> Puzzle:
    """The same puzzle when person i is called order[i]; claims swapped at random where their order
    means nothing."""
    result: list[Statement] = [puzzle[0]] * len(puzzle)
    for speaker, statement in enumerate(puzzle):
        claims = [Claim(order[claim.person], claim.is_knight) for claim in statement.claims]
        if statement.connective != "if" and rng.random() < 0.5:
            claims.reverse()
        result[order[speaker]] = Statement(statement.connective, tuple(claims))
    return tuple(result)


def test_structure_key_ignores_the_order_of_people_and_of_claims():
    rng = random.Random(0)
    for num_people in (2, 3, 4, 5, 6, 7, 8):
        for _ in range(40):
            puzzle = random_puzzle(num_people, rng)
            order = rng.sample(range(num_people), num_people)
            assert structure_key(reordered(puzzle, order, rng)) == structure_key(puzzle)


def test_structure_key_sees_every_other_change():
    rng = random.Random(1)
    for _ in range(200):
        puzzle = random_puzzle(3, rng)
        speaker = rng.randrange(3)
        statement = puzzle[speaker]
        first, *rest = statement.claims
        flipped = Statement(statement.connective, (Claim(first.person, not first.is_knight), *rest))
        changed = (*puzzle[:speaker], flipped, *puzzle[speaker + 1 :])
        # A flip can give the mirror image of the puzzle (0 and 1 change places), which is the same
        # structure.
        images = {
            reordered(puzzle, list(order), random.Random(seed))
            for order in itertools.permutations(range(3))
            for seed in range(8)
        }
        assert (structure_key(changed) == structure_key(puzzle)) == (changed in images)


def test_structure_key_tells_premise_from_conclusion():
    forward = (says("if", (0, True), (1, True)), says("is", (0, True)))
    backward = (says("if", (1, True), (0, True)), says("is", (0, True)))
    assert structure_key(forward) != structure_key(backward)


def test_different_structures_have_different_keys():
    # Two people, counted by brute force over every statement that the generator can make.
    claims = [(person, role) for person in (0, 1) for role in (True, False)]
    pairs = [(c, d) for c in claims for d in claims if c[0] != d[0]]
    joined = [says(connective, c, d) for connective in ("and", "or", "if", "iff") for c, d in pairs]
    by_speaker = [
        [says("is", (1 - speaker, role)) for role in (True, False)] + joined for speaker in (0, 1)
    ]
    puzzles = [p for p in itertools.product(*by_speaker) if len(solutions(p)) == 1]
    rng = random.Random(0)

    def canonical(puzzle: Puzzle) -> str:
        def claim_text(claim: Claim, order: tuple[int, int]) -> str:
            return f"{order[claim.person]}{claim.is_knight}"

        texts = []
        for order in ((0, 1), (1, 0)):
            said = {}
            for speaker, s in enumerate(puzzle):
                parts = [claim_text(claim, order) for claim in s.claims]
                said[order[speaker]] = s.connective + str(
                    parts if s.connective == "if" else sorted(parts)
                )
            texts.append(said[0] + said[1])
        return min(texts)

    assert len({structure_key(p) for p in puzzles}) == len({canonical(p) for p in puzzles})
    drawn = {structure_key(random_puzzle(2, rng)) for _ in range(3000)}
    assert drawn <= {structure_key(p) for p in puzzles}
    assert {split_of(key) for key in drawn} == set(
        SPLITS
    )  # so that drawing until the split fits always ends


# --- the task -------------------------------------------------------------------------------------


def test_no_structure_is_in_two_splits():
    task = KnightsAndKnaves(num_people=[2, 3, 4])
    keys = {split: {task.problem(split, index).key for index in range(1200)} for split in SPLITS}
    assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    assert len(keys["train"]) > 700
    for split in SPLITS:
        assert {split_of(key) for key in keys[split]} == {split}


def test_a_problem_is_a_function_of_its_arguments():
    first = KnightsAndKnaves(num_people=[3, 5])
    second = KnightsAndKnaves(num_people=[3, 5])
    forward = [first.problem("test", index, seed=4) for index in range(10)]
    backward = [second.problem("test", index, seed=4) for index in reversed(range(10))]
    assert forward == backward[::-1]
    assert len({problem.prompt for problem in forward}) == 10
    assert first.problem("test", 0, seed=5) != forward[0]
    assert [problem.difficulty for problem in forward[:3]] == ["3 people", "5 people", "3 people"]


def test_the_first_problem_stays_what_it_is():
    problem = KnightsAndKnaves(num_people=[3], instructions=False).problem("test", 0)
    assert problem == Problem(
        prompt=(
            "You meet Gus, Finn and Dan. Gus says that Finn is a knave. Finn says that Dan is a "
            "knight. Dan says that Dan is a knave if and only if Gus is a knave. Who is a knight "
            "and who is a knave?\n"
        ),
        answer="Gus is a knight, Finn is a knave, Dan is a knave",
        key="acbcedcfd5e66695",
        difficulty="3 people",
        metadata={
            "names": ["Gus", "Finn", "Dan"],
            "world": [True, False, False],
            "num_people": 3,
            "statements": [
                ("is", ((1, False),)),
                ("is", ((2, True),)),
                ("iff", ((2, False), (0, False))),
            ],
        },
    )


PUZZLE = Problem(
    prompt="",
    answer="Ada is a knight, Ben is a knave",
    key="",
    metadata={"names": ["Ada", "Ben"], "world": [True, False], "num_people": 2},
)
CORRECT = Verdict.CORRECT
WRONG = Verdict.WRONG


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("Answer: Ada is a knight, Ben is a knave.", CORRECT),
        ("**Answer:** *ben* is a KNAVE and **Ada** is a knight", CORRECT),
        ("Answer: Ada is a knave. No.\nAnswer: Ada is a knight, Ben is a knave", CORRECT),
        (
            "Answer: nonsense <answer>Ada is a knight\nBen is a knave</answer> Ada is a knave",
            CORRECT,
        ),
        ("Answer: Ada is a knight, Ada is a knight, Ben is a knave", CORRECT),
        ("Ada is a knight, Ben is a knave", WRONG),  # no mark
        ("Answer: Ada is a knight", WRONG),
        ("Answer: Ada is a knight, Ben is a knight", WRONG),
        ("Answer: Ada is a knight, Ben is a knave, Cleo is a knave", WRONG),
        ("Answer: Ada is a knight, Ben is a knave, Ben is a knight", WRONG),
        ("Answer: Adan is a knight, Ben is a knave", WRONG),
        ("<answer>", WRONG),
        ("", WRONG),
    ],
)
def test_exact_judgement(completion, verdict):
    judgement = KnightsAndKnaves(num_people=[2]).judge(PUZZLE, completion)
    assert (judgement.verdict, judgement.reward) == (verdict, float(verdict == CORRECT))


RIGHT = "Ada is a knight, Ben is a knave"
OTHER = "Ada is a knave, Ben is a knight"


@pytest.mark.parametrize(
    ("completion", "verdict", "reward"),
    [
        (f"<think>x</think><answer>{RIGHT}</answer>", CORRECT, 1 + 2),
        (f"<think>x</think> so <answer>{OTHER}</answer>", WRONG, 1 - 1.5),
        ("<think>x</think><answer>Ada is a knight</answer>", WRONG, 1 - 2),
        ("<think>x</think><answer>who knows</answer>", WRONG, 1 - 2),
        (f"<think>x</think><answer>{RIGHT}", WRONG, -1 - 2),
        (f"<answer>{RIGHT}</answer><think>x</think>", CORRECT, -1 - 2),
        (f"<think>x</think></think><answer>{RIGHT}</answer>", CORRECT, -1 - 2),
        (f"Answer: {RIGHT}", CORRECT, -1 - 2),
        ("", WRONG, -1 - 2),
    ],
)
def test_logic_rl_reward(completion, verdict, reward):
    judgement = KnightsAndKnaves(num_people=[2], reward="logic_rl").judge(PUZZLE, completion)
    assert (judgement.verdict, judgement.reward) == (verdict, reward)


def test_every_answer_is_judged_correct_in_the_format_that_the_prompt_asks_for():
    for reward, form in (
        ("exact", "Answer: {}"),
        ("logic_rl", "<think> x </think><answer> {} </answer>"),
    ):
        task = KnightsAndKnaves(num_people=[2, 3, 8], reward=reward)
        for index in range(6):
            problem = task.problem("validation", index)
            assert form.format("Ada is a knight, Ben is a knave")[:8] in problem.prompt
            best = task.judge(problem, form.format(problem.answer))
            assert (best.verdict, best.reward) == (CORRECT, 1.0 if reward == "exact" else 3.0)


def test_answers_of_random_puzzles_parse_back():
    rng = random.Random(3)
    for num_people in range(2, 9):
        (world,) = solutions(random_puzzle(num_people, rng))
        names = [f"Name{i}" for i in range(num_people)]
        assert parse_answer("Answer: " + answer_text(world, names)) == {
            name.lower(): role for name, role in zip(names, world, strict=True)
        }


def test_roles_are_balanced():
    # A student that always answers the same must not win: knights are about half of all people.
    task = KnightsAndKnaves(num_people=[3])
    roles = Counter(
        role for index in range(500) for role in task.problem("train", index).metadata["world"]
    )
    assert 0.4 < roles[True] / 1500 < 0.6


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=()), max_size=20),
            st.sampled_from(
                [
                    "Answer:",
                    "<answer>",
                    "</answer>",
                    "<think>",
                    "</think>",
                    " Ada is a knight",
                    " Ben is a knave",
                    "\n",
                ]
            ),
        )
    ).map("".join)
)
def test_any_completion_is_judged(completion):
    roles = parse_answer(completion)
    exact = KnightsAndKnaves(num_people=[2]).judge(PUZZLE, completion)
    assert (exact.verdict == CORRECT) == (roles == {"ada": True, "ben": False})
    assert logic_rl_reward(completion, {"ada": True, "ben": False}) in (-3.0, -1.0, -0.5, 3.0)


@pytest.mark.parametrize(
    "unit", ["a", " is a knight", "Answer:", "<answer>", "Ada is a ", "\x00", "*"]
)
def test_megabytes_take_less_than_a_second(unit):
    started = time.process_time()
    KnightsAndKnaves(num_people=[2], reward="logic_rl").judge(
        PUZZLE, "Answer: " + unit * (2_000_000 // len(unit))
    )
    assert time.process_time() - started < 1


def test_prompt_says_the_rules_only_when_asked():
    puzzle = HAND_WORKED[0][0]
    assert prompt_text(puzzle, ["Ada", "Ben"]) == (
        "You meet Ada and Ben. Ada says that Ben is a knave. Ben says that Ada is a knight and Ben "
        "is a knight. Who is a knight and who is a knave?\n"
    )
    asked = KnightsAndKnaves(num_people=[2]).problem("train", 0).prompt
    bare = KnightsAndKnaves(num_people=[2], instructions=False).problem("train", 0).prompt
    assert asked.startswith("On an island every person is") and asked.endswith(bare)
    assert KnightsAndKnaves(num_people=[2]).num_problems("train") is None
