import json
import sys
from collections import Counter

import pytest

from rlad.tasks.base import SPLITS, Verdict, judge_completion, split_of, text_key
from rlad.tasks.jsonl import JsonlTask


@pytest.fixture
def write(tmp_path):
    def write(rows, name="data.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return write


def questions(num: int, offset: int = 0) -> list[dict]:
    return [
        {"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(offset, offset + num)
    ]


def test_splits_by_the_hash_of_the_prompt(write):
    task = JsonlTask(write(questions(300)))
    prompts = {
        split: {task.problem(split, i).prompt for i in range(task.num_problems(split))}
        for split in SPLITS
    }
    assert set.union(*prompts.values()) == {row["prompt"] for row in questions(300)}
    for split in SPLITS:
        assert len(prompts[split]) == task.num_problems(split)
        assert {split_of(text_key(prompt)) for prompt in prompts[split]} == {split}


def test_equal_prompts_stay_together(write):
    rows = [
        row | {"prompt": form(row["prompt"])}
        for row in questions(60)
        for form in (str.upper, str.lower, " {}\n".format)
    ]
    task = JsonlTask(write(rows))
    assert [task.num_problems(split) % 3 for split in SPLITS] == [0, 0, 0]


def test_every_epoch_has_every_problem_in_another_order(write):
    task = JsonlTask(write(questions(100)))
    num = task.num_problems("train")
    epochs = [
        [task.problem("train", epoch * num + i).answer for i in range(num)] for epoch in range(3)
    ]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert max(Counter(epochs[0]).values()) == 1
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = JsonlTask(write(questions(100)))
    assert [again.problem("train", num + i).answer for i in range(num)] == epochs[1]
    assert [task.problem("train", i, seed=1).answer for i in range(num)] != epochs[0]


def test_a_question_is_the_same_under_any_system_message_and_as_plain_text(write):
    def chat(system: str, question: str) -> dict:
        return {
            "prompt": [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
            ],
            "answer": "1",
        }

    rows = [chat(system, row["prompt"]) for row in questions(60) for system in ("a", "b")]
    task = JsonlTask(write([*rows, *questions(60)]))
    assert [task.num_problems(split) % 3 for split in SPLITS] == [0, 0, 0]
    plain = JsonlTask(write(questions(60)))
    assert [task.num_problems(split) for split in SPLITS] == [
        3 * plain.num_problems(split) for split in SPLITS
    ]
    with pytest.raises(
        ValueError, match=r"1 of its 60 prompts are also in .*test.jsonl, for example 'What is 3"
    ):
        JsonlTask(
            write(questions(60)), test_path=write([chat("a", "what is 3 + 1?")], "test.jsonl")
        )


def test_held_out_files_are_used_as_they_are(write):
    train = write(questions(50), "train.jsonl")
    validation = write(questions(5, 100), "validation.jsonl")
    test = write(questions(7, 200), "test.jsonl")
    task = JsonlTask(train, validation_path=validation, test_path=test)
    assert [task.num_problems(split) for split in SPLITS] == [50, 5, 7]
    # Without a test file the test split is the share of the training file.
    task = JsonlTask(train, validation_path=validation)
    share = sum(split_of(text_key(row["prompt"])) == "test" for row in questions(50))
    assert share > 0
    assert [task.num_problems(split) for split in SPLITS] == [50 - share, 5, share]


def test_training_prompts_that_are_held_out_are_refused(write):
    train = write(
        [*questions(50), {"prompt": "WHAT  is 201 + 1?", "answer": "202"}, *questions(1, 203)]
    )
    with pytest.raises(
        ValueError,
        match=r"data.jsonl: 2 of its 52 prompts are also in .*test.jsonl, for example 'WHAT  is",
    ):
        JsonlTask(train, test_path=write(questions(7, 200), "test.jsonl"))


def test_fields_numbers_and_blank_lines(write):
    rows = [{"q": f"q {i}", "a": value} for i, value in enumerate([3, 2.5, "x", -1] * 30)]
    task = JsonlTask(
        write(["", *map(json.dumps, rows), " "]),
        prompt_field="q",
        answer_field="a",
        verifier="number",
    )
    assert {task.problem("train", i).answer for i in range(60)} == {"3", "2.5", "x", "-1"}
    problem = next(p for i in range(60) if (p := task.problem("train", i)).answer == "2.5")
    assert task.judge(problem, "it is 5/2").verdict == Verdict.CORRECT
    assert task.judge(problem, "it is 2").verdict == Verdict.WRONG


def test_a_verifier_of_your_own(write):
    task = JsonlTask(
        write(questions(60)), verifier="user_verifiers:by_completion", timeout_seconds=1
    )
    problem = task.problem("train", 0)
    assert task.judge(problem, problem.answer).reward == 1
    assert task.judge(problem, "half").reward == 0.5
    assert task.judge(problem, "raise").verdict == Verdict.CANNOT_JUDGE
    # It sees the whole text also where the token limit cut it off.
    assert judge_completion(task, problem, "half", is_truncated=True).reward == 0.5
    task.close()


GOOD = '{"prompt": "p", "answer": "a"}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [GOOD, "{prompt: 1}"],
            r"data.jsonl, line 2 cannot be read \(Expecting property name.*\); give the path",
        ),
        (
            [GOOD, "", '["p", "a"]'],
            "data.jsonl, line 3: holds a list; write a JSON object with the fields 'prompt' and "
            "'answer'",
        ),
        (
            ['{"question": "p", "answer": 1}'],
            "line 1: has no field 'prompt', only 'question', 'answer'; name it with prompt_field",
        ),
        (
            ['{"prompt": "p"}'],
            "line 1: has no field 'answer', only 'prompt'; name it with answer_field",
        ),
        (
            ['{"prompt": 3, "answer": 1}'],
            "line 1: the field 'prompt' is 3; give a string that is not empty",
        ),
        (['{"prompt": " ", "answer": 1}'], "line 1: the field 'prompt' is \" \"; give a string"),
        (['{"prompt": "p", "answer": true}'], "line 1: the field 'answer' is true; give a string"),
        (
            [
                {
                    "prompt": [{"role": "user", "content": "a", "tool_calls": [{}]}],
                    "answer": "1",
                }
            ],
            "message 1 has 'tool_calls', which a prompt would leave out",
        ),
        (
            [
                {
                    "prompt": [{"role": "user", "content": "a"}],
                    "answer": "1",
                    "tools": [{"name": "f"}],
                }
            ],
            "has 'tools', which a prompt would leave out",
        ),
        (
            ['{"prompt": "p", "answer": NaN}'],
            "line 1: the field 'answer' is nan, which no answer can match",
        ),
        (['{"prompt": "p", "answer": -Infinity}'], "'answer' is -inf, which no answer can match"),
        (['{"prompt": "p", "answer": 1e999}'], "'answer' is inf, which no answer can match"),
        (['{"prompt": "p", "answer": null}'], "line 1: the field 'answer' is null; give a string"),
        (
            ['{"prompt": [], "answer": 1}'],
            "line 1: the field 'prompt': it has messages of nobody; put the system's, if there",
        ),
        (
            [
                '{"prompt": [{"role": "user", "content": "q"}, '
                '{"role": "assistant", "content": "a"}], "answer": 1}'
            ],
            "line 1: the field 'prompt': it has messages of user, assistant; put .* user's last",
        ),
        (
            [
                '{"prompt": [{"role": "user", "content": "q"}, '
                '{"role": "system", "content": "s"}], "answer": 1}'
            ],
            "line 1: the field 'prompt': it has messages of user, system; put .* first and",
        ),
        (
            ['{"prompt": [{"role": "tool", "content": "q"}], "answer": 1}'],
            r'the field \'prompt\': message 1 is {"role": "tool", "content": "q"}; write {"role"',
        ),
        (
            ['{"prompt": [{"role": "user", "content": " "}], "answer": 1}'],
            "message 1 is .* and a text that is not empty",
        ),
        (
            ['{"prompt": [{"role": "user", "content": ["q"]}], "answer": 1}'],
            "message 1 is .* and a text that is not empty",
        ),
        (['{"prompt": ["q"], "answer": 1}'], 'message 1 is "q"; write'),
        (
            ['{"prompt": [{"role": "user", "content": "\\ud800"}], "answer": 1}'],
            "line 1: has half of a surrogate pair",
        ),
        (
            ['{"prompt": "p", "answer": ["a"]}'],
            r"line 1: the field 'answer' is \[\"a\"\]; give a string",
        ),
        (
            ['{"prompt": "\\ud800", "answer": "a"}'],
            "line 1: has half of a surrogate pair",
        ),
        (["[" * 100_000], "line 1 cannot be read"),
        ([], "data.jsonl: none of its problems is for the split train; give more problems"),
        ([" ", ""], "data.jsonl: none of its problems is for the split train"),
        (
            [GOOD],
            "data.jsonl: none of its problems is for the split validation; give more problems",
        ),
    ],
)
def test_bad_lines_are_named(write, lines, message):
    with pytest.raises(ValueError, match=message):
        JsonlTask(write(lines))


def test_other_bad_input_is_refused(write, tmp_path):
    with pytest.raises(
        ValueError, match=r"gone.jsonl cannot be read \(.*No such file.*\); give the path"
    ):
        JsonlTask(str(tmp_path / "gone.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "né", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl, line 1 cannot be read \('utf-8' codec"):
        JsonlTask(str(tmp_path / "latin.jsonl"))
    with pytest.raises(ValueError, match="unknown verifier 'exakt'"):
        JsonlTask(write(questions(50)), verifier="exakt")


def test_a_name_on_the_hub_needs_the_package_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"owner/data is no file here, .*: pip install 'rlad\[datasets\]'"
    ):
        JsonlTask("owner/data")


@pytest.mark.datasets
def test_hugging_face_folders(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")
    rows = datasets.Dataset.from_list(questions(50))
    rows.save_to_disk(str(tmp_path / "plain"))
    assert JsonlTask(str(tmp_path / "plain")).problem("train", 0).prompt.startswith("What is")
    held_out = datasets.Dataset.from_list(questions(7, 100))
    folder = str(tmp_path / "splits")
    datasets.DatasetDict({"train": rows, "test": held_out}).save_to_disk(folder)
    task = JsonlTask(folder, test_path=folder)
    assert task.num_problems("test") == 7
    assert sum(task.num_problems(split) for split in SPLITS) == 57
    with pytest.raises(ValueError, match="datasets cannot load its split validation"):
        JsonlTask(folder, validation_path=folder)
    with pytest.raises(ValueError, match=r"plain, row 1: has no field 'question'"):
        JsonlTask(str(tmp_path / "plain"), prompt_field="question")


def test_the_field_that_an_answer_was_taken_from_is_the_solution(write):
    """Where it holds more than the answer, and under the row's own name where it has one."""
    whole = "48 / 2 = \\boxed{24}\n#### 24"
    rows = [row | {"answer": whole} for row in questions(300)]
    for answer_format, answer, metadata in (
        ("gsm8k", "24", {"solution": whole}),
        ("boxed", "24", {"solution": whole}),
        ("whole", whole, {}),
    ):
        problem = JsonlTask(write(rows), answer_format=answer_format).problem("train", 0)
        assert (problem.answer, problem.metadata) == (answer, metadata)
    rows = [row | {"solution": "by hand"} for row in rows]
    problem = JsonlTask(write(rows), answer_format="gsm8k").problem("train", 0)
    assert problem.metadata == {"solution": "by hand"}
    bare = JsonlTask(write(questions(300)), answer_format="last").problem("train", 0)
    assert bare.metadata == {}
