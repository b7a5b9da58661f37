"""Held-out problems among the training problems: counted by hand at and around each limit."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlad.checks.check import check_run
from rlad.checks.contamination import Contamination, find_contamination, finite_problems, words
from rlad.config.file import parse_config
from rlad.tasks import Problem, make_task
from rlad.tasks.base import text_key
from tiny_runs import run_config, write_world

# 13 different words, and a stock of others that occur nowhere else.
LINE = "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike"
RUN = LINE.split()


def problem(text: str, **more: Any) -> Problem:
    return Problem(text, "1", text_key(text), **more)


def others(name: str, number: int) -> list[str]:
    return [f"{name}{i}" for i in range(number)]


def text(*parts: list[str]) -> str:
    return " ".join(word for part in parts for word in part)


def found(train: list[str], held_out: list[str]) -> Contamination:
    return find_contamination(map(problem, train), map(problem, held_out))


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    held_out = [text(others("h", 5), RUN, others("i", 5))]
    for shared, number in ((13, 1), (12, 0)):
        train = [text(others("t", 9), RUN[:shared], others("u", 9))]
        seen = found(train, held_out)
        assert (seen.num_found, seen.num_held_out, seen.num_train, seen.num_same) == (
            number,
            1,
            1,
            0,
        )
        assert seen.example == (" ".join(RUN) if number else "")
    # The same 13 words with another between them are no run.
    assert found([text(RUN[:6], ["between"], RUN[6:])], held_out).num_found == 0


def test_a_problem_of_8_to_12_words_is_found_whole_and_a_shorter_one_only_as_it_is():
    for size in (8, 12):
        held_out = [text(RUN[:size])]
        assert found([text(others("t", 4), RUN[:size], others("u", 4))], held_out).num_found == 1
        assert (
            found([text(others("t", 4), RUN[: size - 1], others("u", 4))], held_out).num_found == 0
        )
    assert found([text(RUN[:7], others("t", 4))], [text(RUN[:7])]).num_found == 0
    same = found(["What  IS 2 + 2?", "other"], ["What is 2 + 2?", "What is 3 + 3?"])
    assert (same.num_found, same.num_same, same.example) == (1, 1, "what is 2 2")


def test_case_punctuation_and_compatibility_forms_make_no_difference():
    assert words("Tom's $80,000: x_1 = \ufb01ve½!") == [
        "tom",
        "s",
        "80",
        "000",
        "x",
        "1",
        "five1",
        "2",
    ]
    disguised = ", ".join(RUN).upper() + "!"
    assert found([f"(see) {disguised}"], [text(RUN, others("h", 3))]).num_found == 1


UNSPACED = {
    "Chinese": "小明有五个苹果又买了三个现在一共有几个苹果",
    "Japanese": "りんごを五つ持っているカナはさらに三つ買いました",
    "Thai": "ซอมแอปเปลหาผลแลวซอเพมอกสามผลตอนนมกผล",
}


@pytest.mark.parametrize("script", UNSPACED)
def test_of_scripts_without_spaces_each_letter_is_a_word(script):
    letters = UNSPACED[script]
    assert words(f"{letters[:9]}、12 apples {letters[9:]}。") == [
        *letters[:9],
        "12",
        "apples",
        *letters[9:],
    ]
    held_out, foreign = [f"{letters[:14]}？"], "".join(map(chr, range(0x5000, 0x5008)))
    for shared, number in ((13, 1), (12, 0)):
        seen = found([f"{foreign}{letters[:shared]}{foreign}"], held_out)
        assert (seen.num_found, seen.example) == (number, " ".join(letters[:13]) if number else "")
    assert found([f"{foreign}{letters[:8]}。"], [letters[:8]]).num_found == 1
    assert found([f"{foreign}{letters[:7]}{foreign}"], [letters[:8]]).num_found == 0


def test_marks_above_and_below_letters_are_no_words():
    assert words("มีผู้ซื้อ") == list("มผซอ")


@pytest.mark.parametrize("num_train", [10, 11])
def test_what_stands_in_more_than_ten_training_problems_is_an_instruction(num_train):
    train = [text(others(f"t{i}x", 5), RUN) for i in range(num_train)]
    assert found(train, [text(others("h", 5), RUN)]).num_found == (1 if num_train == 10 else 0)


@pytest.mark.parametrize("num_held_out", [10, 11])
def test_what_stands_in_more_than_ten_held_out_problems_is_an_instruction(num_held_out):
    held_out = [text(others(f"h{i}x", 5), RUN) for i in range(num_held_out)]
    assert found([text(others("t", 5), RUN)], held_out).num_found == (
        10 if num_held_out == 10 else 0
    )


@pytest.mark.parametrize(("num_own_words", "number"), [(3, 1), (4, 0)])
def test_a_question_in_more_than_ten_training_problems_is_found_where_it_is_most_of_a_problem(
    num_own_words, number
):
    """13 of 16 words are four fifths, 13 of 17 are not; what more than 10 held-out problems share
    does not count."""
    common = others("c", 8)
    held_out = [text(others(f"h{i}x", 20), common) for i in range(11)] + [
        text(others("h", num_own_words), RUN, common)
    ]
    train = [text(others(f"t{i}x", 5), RUN, others(f"u{i}x", 5)) for i in range(11)]
    seen = found(train, held_out)
    assert (seen.num_found, seen.example, seen.has_phrases) == (
        number,
        " ".join(RUN) if number else "",
        True,
    )
    assert not found(train[:10], held_out[:11]).has_phrases


def test_an_instruction_hides_nothing_beside_it():
    """Each problem ends with RUN. One question is shared, another has only its last word and the
    instruction in common."""
    question = others("q", 13)
    held_out = [
        text(question, RUN),
        text(others("k", 12), ["last"], RUN),
        *(text(others(f"h{i}x", 13), RUN) for i in range(20)),
    ]
    train = [
        text(["before"], question, RUN),
        text(others("m", 12), ["last"], RUN),
        text(others("t", 9), RUN),
    ]
    seen = found(train, held_out)
    assert (seen.num_found, seen.example) == (1, " ".join(question))


def test_a_system_message_is_not_compared_and_equal_problems_count_once():
    messages = (("system", " ".join(others("s", 20))), ("user", text(RUN)))
    one = Problem("shown", "1", text_key(text(RUN)), messages=messages)
    assert find_contamination([one], [one, one]).num_found == 1
    only_system = problem(text(others("s", 20)))
    assert find_contamination([one], [only_system]).num_found == 0


def test_generated_tasks_have_nothing_to_compare_and_several_give_those_of_each(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) + "\n" for i in range(60))
    )
    logic, sums = {"type": "knights_and_knaves"}, {"type": "jsonl", "path": str(path)}
    assert list(finite_problems(make_task(**logic), "test")) == []
    task = make_task("several", tasks={"logic": logic, "sums": sums})
    assert len(list(finite_problems(task, "train", 5))) == 5
    assert (
        sum(len(list(finite_problems(task, split))) for split in ("train", "validation", "test"))
        == 60
    )


# --- rlad check -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def finding(config: dict[str, Any]) -> tuple[str, str]:
    (one,) = [
        f
        for f in check_run(parse_config(config), with_models=False).findings
        if f.subject == "held-out problems"
    ]
    return one.level, one.message


def test_check_says_how_many_and_which(world, tmp_path):
    assert finding(run_config(world, tmp_path)) == (
        "ok",
        "none of 4 shares 13 words in a row with any of 5 training problems",
    )
    long_sum = "0 + 1 + 2 + 0 + 1 + 2 + 0 + 1 + 2 + 0 + 1 + 2 + 0 ="
    files = {"path": [f"1 + {long_sum}", "1 + 1 ="], "test_path": [f"{long_sum} 2", "0 + 2 ="]}
    for name, prompts in files.items():
        rows = [json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    task = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    level, message = finding(run_config(world, tmp_path, task=task))
    assert level == "warning" and message == (
        "1 of 4 are among the 2 training problems (0 as they are, the others with 13 words in a "
        "row or all of a shorter "
        "one), for example '0 1 2 0 1 2 0 1 2 0 1 2 0'; remove them from those."
    )


def test_check_says_that_phrases_were_left_aside(world, tmp_path):
    """Eight words that stand in all training prompts and in half of the one question that
    measures."""
    phrase = "0 0 1 1 2 2 0 1 ="
    prompts = {
        "path": [f"{i % 3} + {i // 3} + {phrase}" for i in range(27)],
        "test_path": [f"{phrase} + 2 + 2 + 2 + 2 + 2"],
    }
    for name, lines in prompts.items():
        rows = [json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in lines]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    task = {name: str(tmp_path / f"{name}.jsonl") for name in prompts}
    assert finding(run_config(world, tmp_path, task=task, rollout={"prompts_per_batch": 30})) == (
        "ok",
        "none of 3 shares 13 words in a row with any of 27 training problems, apart from phrases "
        "that are in more than 10 of "
        "either",
    )


def test_a_test_set_of_another_task_is_compared_too(world, tmp_path):
    """The test set of another file holds a training problem: each file alone is clean."""
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"prompt": f"= {i}", "answer": i}) + "\n" for i in range(60))
    )
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": "2"}) + "\n")
    other = {
        "type": "jsonl",
        "path": str(tmp_path / "other.jsonl"),
        "test_path": str(tmp_path / "test.jsonl"),
    }
    ood_task = {"type": "several", "tasks": {"other": other}}
    level, message = finding(run_config(world, tmp_path, evaluation={"ood_task": ood_task}))
    assert level == "error" and message.startswith(
        "1 of 5 are among the 5 training problems (1 as they are"
    )
    assert "for example '1 1'" in message
