"""`rlad chat`: answers are what the model writes, the teacher's view is its log-probs, and it ends
cleanly."""

import copy
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AddedToken

from rlad.cli.chat import Chat, _Pieces, opinion_text
from rlad.cli.main import main
from rlad.config.file import load_config
from rlad.errors import UserError
from rlad.models.loading import load_language_model
from rlad.rollouts.prompts import prompt_token_ids
from rlad.teachers import prepare_teacher

QUESTION = "You meet Ada and Ben. Ada says that Ben is a knight. Who is a knight?"
CHAT = [sys.executable, "-m", "rlad", "chat", "embedded/student", "--seed", "1"]


@pytest.fixture(scope="module")
def student():
    return load_language_model("embedded/student")


def test_greedy_answers_are_the_likeliest_tokens_and_come_in_pieces(student):
    chat = Chat(student, load_config(None), temperature=0)
    pieces = []
    prompt, answer = chat.answer(QUESTION, pieces.append)

    assert prompt == prompt_token_ids(student.tokenizer, QUESTION + "\n", chat.config.rollout)
    ids = torch.tensor([prompt + answer])
    likeliest = student.model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
    assert answer == likeliest.tolist()
    assert "".join(pieces).strip() == student.tokenizer.decode(answer, skip_special_tokens=True)
    assert len(pieces) > 3 and chat.messages[-1] == ("assistant", "".join(pieces))


def test_the_teachers_view_is_the_log_ratio_of_both_models(student):
    config = load_config(None)
    teacher = prepare_teacher(config, student)
    chat = Chat(student, config, temperature=0, teacher=teacher)
    prompt, answer = chat.answer(QUESTION, lambda piece: None)

    ids = torch.tensor([prompt + answer])
    of_model = []
    for model in (student.model, load_language_model("embedded/teacher").model):
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        of_model.append(logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0])
    expected = (of_model[0] - of_model[1]).tolist()
    assert chat.log_ratios(prompt, answer) == pytest.approx(expected, abs=1e-4)


def test_the_teacher_of_a_lora_run_may_be_its_base_model(tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft", reason="[student.lora] needs peft")
    run = tmp_path / "run"
    short = ("optimization.num_steps=1", "rollout.prompts_per_batch=1", "rollout.group_size=2")
    short += ("rollout.max_completion_tokens=8", "evaluation.num_validation_problems=1")
    lora = ("student.lora.rank=2", "teacher={type='adapter'}", "evaluation.num_test_problems=1")
    main(["train", f"run_dir={run}", *short, *lora], standalone_mode=False)
    capsys.readouterr()

    # The first checkpoint's adapter is 0 yet: student and base model are one.
    first = str(run / "checkpoints" / "step-000000")
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    main(["chat", first, "--teacher", "--max-tokens", "6"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert re.search(r"log student - log teacher: mean [+-]0\.000", printed)


def test_tags_that_are_special_tokens_are_shown(student):
    tokenizer = copy.deepcopy(student.tokenizer)
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in ("<think>", "</think>")])
    ids = tokenizer("<think>Ada is</think>a knight")["input_ids"]
    shown: list[str] = []
    pieces = _Pieces(tokenizer, shown.append)
    pieces.put(torch.tensor([[5, 6]]))  # the prompt
    for one in [*ids, student.eos_token_ids[0]]:
        pieces.put(torch.tensor([one]))
    pieces.end()
    assert "".join(shown) == pieces.text == tokenizer.decode(ids)
    assert pieces.text.startswith("<think>") and pieces.ids[:-1] == ids


def test_tokens_are_marked_where_the_two_disagree():
    text = opinion_text(["a", "b", "c", "d"], [0.6, -0.6, 0.4, float("nan")], with_marks=True)
    assert text.plain == "[-a][+b]cd"


def test_a_conversation_that_fills_the_context_is_one_sentence(student):
    chat = Chat(student, load_config(None), temperature=0)
    with pytest.raises(UserError, match="/new starts a new one"):
        chat.answer("word " * 5000, lambda piece: None)
    assert chat.messages == []


def test_a_pipe_is_one_question_and_one_answer():
    ended = subprocess.run(CHAT, input=QUESTION, text=True, capture_output=True, check=False)
    assert ended.returncode == 0 and "Answer:" in ended.stdout
    assert "Traceback" not in ended.stderr and "\x1b" not in ended.stdout


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat():
    controller, terminal = pty.openpty()
    # Without readline, which takes the terminal over at its own time, the terminal echoes each
    # line once. With this seed the answer is long.
    command = "import sys; sys.modules['readline'] = None; from rlad.__main__ import run; run()"
    arguments = [*CHAT[3:-1], "3", "--temperature", "5", "--max-tokens", "900"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    seen = _read_until(controller, "you> ")
    os.write(controller, f"{QUESTION}\n".encode())
    # The question as the terminal shows it, and then some of the answer.
    seen += _read_until(controller, "knight?", more=60)
    process.send_signal(signal.SIGINT)
    seen += _read_until(controller, "\nyou> ")
    os.write(controller, b"\x04")
    assert process.wait(timeout=30) == 0
    assert "Traceback" not in seen


def _read_until(controller, text, *, more=0):
    """Read up to a text that is shown, and so many characters after it."""
    seen = ""
    limit = time.monotonic() + 120
    while len(seen.rpartition(text)[2]) < more or text not in seen:
        assert time.monotonic() < limit, seen
        seen += os.read(controller, 4096).decode(errors="replace")
    return seen
