"""What a privileged teacher is shown of its problem and its group, and that it always fits."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlad.config.context import ContextConfig, ContextTexts
from rlad.config.distributions import OPSDConfig
from rlad.config.file import parse_config
from rlad.config.run import RolloutConfig
from rlad.config.validation import validated
from rlad.errors import UserError
from rlad.models.without_weights import load_tokenizer
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.types import Completion, Rollout, Turn
from rlad.tasks import Problem
from rlad.teachers import check_teacher
from rlad.teachers.base import Setting, TeacherRequest
from rlad.teachers.contexts import (
    MIN_PEER_TOKENS,
    Block,
    BlockContext,
    blocks_of,
    cut_middle,
    even_cap,
    fit,
)
from rlad.teachers.local import LocalTeacher
from rlad.teachers.privileged import PrivilegedTeacher
from rlad.teachers.several import TeacherByTask, TeacherMixture
from tiny_models import tiny_language_model, tiny_tokenizer
from tiny_runs import run_config, write_model

PROBLEM = Problem("w3 w4", "w5", "k", metadata={"hint": "w6 w7", "size": 3, "names": ["x"]})


def rollout(text: str, reward: float, feedback: str = "") -> Rollout:
    verdict = "cannot_judge" if math.isnan(reward) else "correct" if reward == 1 else "wrong"
    return Rollout(Completion((), (), False), text, verdict, reward, feedback=feedback)


def request(
    own: Rollout | None, *peers: Rollout, problem: Problem = PROBLEM, completion: Sequence[int] = ()
) -> TeacherRequest:
    return TeacherRequest((3, 4), completion, problem, own, peers)


def shown(settings: ContextConfig, asked: TeacherRequest, seed: int = 0) -> list[str]:
    return [block.text for block in blocks_of(settings, asked, seed=seed)]


# --- which blocks, by hand ------------------------------------------------------------------------

WRONG = rollout("own wrong", 0.0, "off by one")
RIGHT = rollout("own right", 1.0)
GROUP = (
    rollout("bad a", 0.0),
    rollout("good a", 1.0),
    rollout("unjudged", math.nan),
    rollout("good a", 1.0),
    rollout("half", 0.5),
    rollout("good b", 1.0),
    rollout("good c", 1.0),
)


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"num_successes": 1}, ["good a"]),
        ({"num_successes": 2}, ["good a", "good b"]),
        ({"num_successes": 9}, ["good a", "good b", "good c"]),
        ({"num_failures": 1}, ["bad a"]),
        ({"num_successes": 1, "num_failures": 1}, ["good a", "bad a"]),
        ({"num_successes": 2, "num_failures": 1}, ["good a", "good b", "bad a"]),
        ({"num_failures": 9}, ["bad a", "half"]),
        ({"num_successes": 1, "success_reward": 0.5}, ["good a"]),
        ({"num_successes": 9, "success_reward": 0.5}, ["good a", "half", "good b", "good c"]),
        ({"num_failures": 9, "failure_reward": 0.0}, ["bad a"]),
        ({"num_failures": 9, "failure_reward": -1.0}, []),
        ({"answer": True, "fields": ("hint", "size")}, ["w5", "w6 w7", "3"]),
        ({"answer": True, "num_successes": 1, "num_failures": 1}, ["w5", "good a", "bad a"]),
        ({"fields": ("names", "nothing")}, []),
        ({"solution": True}, []),
        ({"answer": True, "solution": True, "fields": ("hint",)}, ["w5", "w6 w7"]),
    ],
)
def test_the_blocks_of_a_group(settings: dict[str, Any], texts: list[str]) -> None:
    """The same text once, one that was not judged never."""
    assert shown(ContextConfig(**settings), request(WRONG, *GROUP)) == texts


def test_a_solution_is_shown_in_place_of_the_answer() -> None:
    problem = replace(PROBLEM, metadata={"solution": "w3 so w5"})
    opsd = OPSDConfig.default_teacher
    assert opsd is not None
    for settings in (ContextConfig(solution=True), validated(ContextConfig, opsd["context"])):
        (block,) = blocks_of(settings, request(WRONG, problem=problem), seed=0)
        assert str(block) == "A reference solution:\nw3 so w5"


def test_headings_say_which_solution_it_is() -> None:
    settings = ContextConfig(answer=True, num_successes=2, num_failures=1, fields=("hint",))
    assert [
        str(block).partition("\n")[0]
        for block in blocks_of(settings, request(WRONG, *GROUP), seed=0)
    ] == [
        "The correct answer:",
        "Hint:",
        "A correct solution:",
        "Another correct solution:",
        "A wrong attempt, not to be repeated:",
    ]


@pytest.mark.parametrize(
    ("without_success", "own", "texts"),
    [
        ("silent", WRONG, []),
        ("plain", WRONG, []),
        ("failures", WRONG, ["bad a"]),
        ("failures", rollout("bad a", 0.0), []),
    ],
)
def test_without_a_success_there_is_nothing_or_failures_alone(
    without_success: Any, own: Rollout, texts: list[str]
) -> None:
    settings = ContextConfig(num_successes=2, num_failures=1, without_success=without_success)
    assert shown(settings, request(own, rollout("bad a", 0.0))) == texts


def test_feedback_is_for_a_wrong_completion_without_a_success() -> None:
    settings = ContextConfig(num_successes=2, num_failures=1, feedback=True)
    bad, good = rollout("bad", 0.0), rollout("good", 1.0)
    assert shown(settings, request(WRONG, bad)) == ["off by one"]
    assert shown(settings, request(WRONG, bad, good)) == ["good", "bad"]
    assert shown(settings, request(RIGHT, bad)) == []
    assert shown(settings, request(rollout("x", 0.0), bad)) == []
    assert shown(settings, request(rollout("x", math.nan, "no"), bad)) == []
    alone = ContextConfig(feedback=True)
    assert shown(alone, request(WRONG, good)) == ["off by one"]


def test_a_completion_never_sees_its_own_text() -> None:
    """Not even as another rollout of the group that is equal to it."""
    settings = ContextConfig(num_successes=3, num_failures=3)
    for own in (WRONG, RIGHT):
        copies = [replace(own), rollout("good", 1.0), rollout("bad", 0.0), replace(own)]
        for order in itertools.permutations(copies):
            assert sorted(shown(settings, request(own, *order))) == ["bad", "good"]


def test_thoughts_are_hidden_unless_they_shall_be_shown() -> None:
    peers = [
        rollout("<think> a </think> b </think>\nfirst", 1.0),
        rollout("never ended </think>", 1.0),
        rollout("<think> not ended", 1.0),
        rollout("second", 1.0),
    ]
    settings = ContextConfig(num_successes=4)
    assert shown(settings, request(WRONG, *peers)) == ["first", "second"]
    whole = settings.model_copy(update={"show_thoughts": True})
    assert shown(whole, request(WRONG, *peers)) == [peer.text for peer in peers]


def test_thoughts_are_hidden_in_each_turn_of_an_episode() -> None:
    """Also where the chat template has begun the thought of each turn."""
    turns = (Turn("up?</think>up", "A wall.", 0.0), Turn("so</think>left", "", 1.0))
    peer = replace(rollout("up?</think>up\n\nA wall.\n\nso</think>left", 1), turns=turns)
    asked = request(rollout("down", 0), peer)
    assert shown(ContextConfig(num_successes=1), asked) == ["up\n\nA wall.\n\nleft"]


@pytest.mark.parametrize("show_thoughts", [False, True])
def test_what_is_shown_is_compared_not_what_was_written(show_thoughts: bool) -> None:
    """Other thoughts before the same answer, more white space and special tokens are no other
    text."""
    made = context(ContextConfig(num_successes=9, num_failures=9, show_thoughts=show_thoughts))
    for reward in (0.0, 1.0):
        own = rollout("<think> w3 </think> w7", reward)
        peers = [
            rollout("<think> w4 </think> w7", 1.0),
            rollout("<think> w3 </think> w7 \n", 0.0),
            rollout("<think> w3 </think> w<eos>7", 1.0),
            rollout("<think> w3 </think> w8", 1.0),
            rollout("<think> w3 </think> w8<eos>", 1.0),
        ]
        fitted = made.fitted(request(own, *peers), None)
        assert fitted is not None
        assert [block.text.rpartition("> ")[2] for block in fitted.blocks] == (
            ["w7", "w8"] if show_thoughts else ["w8"]
        )


def test_a_random_choice_belongs_to_seed_and_completion() -> None:
    """Each of six solutions is drawn about as often, and the draw is the same in any process."""
    settings = ContextConfig(num_successes=1, choice="random")
    peers = [rollout(f"good {i}", 1.0) for i in range(6)]
    drawn = [
        shown(settings, request(WRONG, *peers, completion=(i,)), seed=7)[0] for i in range(600)
    ]
    assert drawn == [
        shown(settings, request(WRONG, *peers, completion=(i,)), seed=7)[0] for i in range(600)
    ]
    assert all(60 < drawn.count(peer.text) < 140 for peer in peers)
    assert drawn != [
        shown(settings, request(WRONG, *peers, completion=(i,)), seed=8)[0] for i in range(600)
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "it shows nothing; set num_successes"),
        ({"answer": True, "failure_reward": 1.0}, "failure_reward 1.0 is not below success_reward"),
        ({"num_successes": 1, "without_success": "failures"}, "shows nothing with num_failures"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validated(ContextConfig, settings)


# --- making them fit ------------------------------------------------------------------------------


def test_an_even_cap_by_hand() -> None:
    assert even_cap([10, 50, 90], 100) == 45
    assert even_cap([90, 10, 50], 149) == 89
    assert even_cap([90, 10, 50], 150) is None  # nothing need be cut
    assert even_cap([40, 40], 41) == 20
    assert (
        even_cap([40, 40], 1) is even_cap([40], 0) is even_cap([40], -3) is even_cap([], 5) is None
    )


def test_an_even_cap_is_the_largest() -> None:
    rng = random.Random(0)
    for _ in range(500):
        lengths = [rng.randrange(1, 60) for _ in range(rng.randrange(1, 6))]
        total = rng.randrange(0, sum(lengths))
        caps = [c for c in range(1, 61) if sum(min(n, c) for n in lengths) <= total]
        assert even_cap(lengths, total) == max(caps, default=None)


def words(first: int, number: int) -> str:
    return " ".join(f"w{3 + (first + i) % 29}" for i in range(number))


def context(settings: ContextConfig | None = None, tokenizer: Any = None) -> BlockContext:
    """Words of a tokenizer that knows w3, w4, ...: one token each, and one for everything else."""
    tokenizer = tokenizer or tiny_tokenizer()
    return BlockContext(
        settings or ContextConfig(num_successes=2, num_failures=1),
        seed=0,
        tokenizer=tokenizer,
        encode=partial(prompt_token_ids, tokenizer, rollout=RolloutConfig()),
    )


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<eos2> w3 {{ m['content'] }} w4 {% endfor %}"
        "{% if add_generation_prompt %} w5 w6{% endif %}"
    )
    return tokenizer


def test_a_middle_is_cut_by_tokens() -> None:
    tokenizer = tiny_tokenizer()
    text = words(0, 40)
    cut = cut_middle(text, 11, tokenizer)
    assert cut.split() == [*text.split()[:5], "[...]", *text.split()[-5:]]
    assert cut_middle(text, 40, tokenizer) == text


def test_what_is_shown_fits_at_every_length() -> None:
    """From the whole prompt down to nothing, one token at a time: it is never longer than the room,
    begins with the question and ends with the request and the template's header. Solutions of 90,
    60 and 50 tokens lose their middle first; then the wrong attempt goes, then a solution."""
    peers = (
        rollout(words(0, 90), 1.0),
        rollout(words(7, 60), 1.0),
        rollout(words(3, 50), 0.0),
    )
    made = context(tokenizer=chat_tokenizer())
    asked = request(WRONG, *peers)
    whole = made.fitted(asked, None)
    assert whole is not None and whole.num_shortened == whole.num_dropped == 0
    ids = made.token_ids(PROBLEM, [])
    begin, end = list(ids[:4]), list(ids[4:])
    assert begin == [2, 3, 3, 4] and end[-3:] == [4, 5, 6]
    seen = []
    for room in range(len(whole.token_ids), 0, -1):
        fitted = made.fitted(asked, room)
        if fitted is None:
            break
        assert len(fitted.token_ids) <= room
        assert (
            room - len(fitted.token_ids) <= 3 or fitted.num_dropped or room == len(whole.token_ids)
        )
        assert list(fitted.token_ids[:4]) == begin
        assert list(fitted.token_ids[-len(end) :]) == end
        assert fitted.num_successes == min(2, 3 - fitted.num_dropped)
        seen.append((fitted.num_dropped, fitted.num_shortened))
    dropped = [number for number, _ in seen]
    assert dropped == sorted(dropped) and set(dropped) == {0, 1, 2}
    assert {3, 2, 1} <= {number for number_dropped, number in seen if number_dropped == 0}
    # Shorter than the shortest piece of one solution nothing is left to show.
    heading = len(made.token_ids(PROBLEM, [Block("A correct solution:", "")]))
    assert room == heading + MIN_PEER_TOKENS - 1


def test_feedback_takes_the_place_of_a_solution_that_does_not_fit() -> None:
    """It is chosen where no solution is shown, not where there is none: heading and shortest piece
    of one are 35 tokens, the feedback with its heading is 6."""
    settings = ContextConfig(num_successes=1, num_failures=1, feedback=True)
    made = context(settings.model_copy(update={"texts": ContextTexts(feedback="w3 w3 w3")}))
    own = rollout("w9", 0.0, "w6 w7 w8")
    asked = request(own, rollout(words(0, 90), 1.0), rollout("w4", 0.0))
    question = len(made.token_ids(PROBLEM, []))
    for room, texts in ((question + 34, ["w6 w7 w8"]), (question + 5, None)):
        fitted = made.fitted(asked, room)
        assert (fitted and [block.text for block in fitted.blocks]) == texts
        assert fitted is None or fitted.num_dropped == 1
    fitted = made.fitted(asked, question + 35)
    assert fitted is not None and fitted.num_successes == 1
    # Wrong attempts alone stay away, as where there is no solution; beside the answer they come.
    wanted = {"num_successes": 1, "num_failures": 1, "answer": True}
    with_answer = context(ContextConfig(**wanted)).fitted(asked, question + 15)
    assert with_answer is not None
    assert [block.text for block in with_answer.blocks] == ["w5", "w4"]


def test_blocks_that_are_no_completions_are_dropped_whole() -> None:
    made = context(ContextConfig(answer=True, fields=("hint",)))
    question = len(made.token_ids(PROBLEM, []))
    for room, texts in ((question + 9, ["w5", "w6 w7"]), (question + 6, ["w5"])):
        fitted = made.fitted(request(WRONG), room)
        assert fitted is not None and [block.text for block in fitted.blocks] == texts
    assert made.fitted(request(WRONG), question) is None
    limited = context(ContextConfig(answer=True, fields=("hint",), max_prompt_tokens=question + 6))
    fitted = limited.fitted(request(WRONG), None)
    assert fitted is not None and fitted.num_dropped == 1


def test_a_text_that_is_tokenized_anew_into_more_tokens_is_cut_further() -> None:
    """An encoder to which a cut costs 20 tokens more: cut to 100, the text has 120 at first."""
    text = words(0, 200)

    def encode(blocks: Sequence[Block]) -> list[int]:
        (block,) = blocks
        return [0] * (len(block.text.split()) + 20 * ("[...]" in block.text))

    fitted = fit(
        [Block("", text, is_peer=True)], encode=encode, room=100, tokenizer=tiny_tokenizer()
    )
    assert fitted is not None and len(fitted.token_ids) == 100


def test_a_completion_cannot_end_the_teachers_message() -> None:
    """Special tokens that a model has spelled out are taken away, also those put together by
    that."""
    made = context(ContextConfig(num_successes=1), chat_tokenizer())
    plain = made.fitted(request(WRONG, rollout("w7 w8", 1.0)), None)
    for text in ("w7 <eos>w8", "w7 <p<eos>ad>w8", "<eos>w7 w8<pad>"):
        spelled = made.fitted(request(WRONG, rollout(text, 1.0)), None)
        assert plain is not None and spelled is not None
        assert list(spelled.token_ids) == list(plain.token_ids)


def test_a_conversation_keeps_its_earlier_messages() -> None:
    problem = Problem(
        "shown", "w5", "k", messages=(("user", "w9"), ("assistant", "w10"), ("user", "w11"))
    )
    made = context(ContextConfig(answer=True), chat_tokenizer())
    ids = list(made.token_ids(problem, [Block("", "w5")]))
    assert ids[:12] == [2, 3, 9, 4, 2, 3, 10, 4, 2, 3, 11, 5]


# --- the teacher ----------------------------------------------------------------------------------


def teacher_with(settings: ContextConfig, room: int | None = None) -> PrivilegedTeacher:
    model = LocalTeacher(tiny_language_model(seed=4), temperature=0.7, tokens_per_batch=64)
    blocks = context(settings)
    return PrivilegedTeacher(
        model, "{prompt}", encode=lambda prompt: [3], context=room, blocks=blocks
    )


def test_the_teacher_scores_the_completion_after_what_it_is_shown() -> None:
    texts = {"texts": {"first_success": "w9", "failure": "", "request": "w10"}}
    teacher = teacher_with(ContextConfig(num_successes=1, num_failures=1, **texts))  # pyright: ignore[reportArgumentType]
    asked = request(WRONG, rollout("w7 w8", 1.0), rollout("w6", 0.0), completion=(11, 12, 13))
    (found,) = teacher.logprobs([asked])
    inner = teacher.teacher
    (wanted,) = inner.logprobs([TeacherRequest((3, 4, 9, 7, 8, 6, 10), (11, 12, 13))])
    assert torch.equal(found, wanted)
    assert teacher.pop_metrics() == {
        "teacher/privileged/frac": 1,
        "teacher/shown_successes/mean": 1,
        "teacher/shortened/frac": 0,
        "teacher/dropped_blocks/frac": 0,
    }


def test_where_the_teacher_speaks() -> None:
    good, bad = rollout("w7", 1.0), rollout("w8", 0.0)
    silent = teacher_with(ContextConfig(num_successes=1, num_failures=1))
    plain = teacher_with(ContextConfig(num_successes=1, num_failures=1, without_success="plain"))
    answer = teacher_with(ContextConfig(num_successes=1, answer=True))
    for asked, speak in (
        (request(WRONG, good, bad), True),
        (request(WRONG, bad), False),
        (request(RIGHT, bad), False),
        (TeacherRequest((3,), (4,)), False),
    ):
        assert silent.speaks(asked) is speak
        assert plain.speaks(asked)
        assert answer.speaks(asked) is (asked.problem is not None)
        by_task = TeacherByTask({"": silent, "other": plain})
        assert by_task.speaks(asked) is speak
        mixture = TeacherMixture({"a": silent, "b": plain}, {"a": 1, "b": 1})
        assert mixture.speaks(asked) is speak
    assert silent.needs_group and mixture.needs_group and not answer.teacher.needs_group
    assert teacher_with(ContextConfig(feedback=True)).needs_group
    assert by_task.may_be_silent and mixture.may_be_silent and not plain.may_be_silent
    # It has no room for what it would show.
    assert not teacher_with(ContextConfig(answer=True), room=8).speaks(
        request(WRONG, completion=(11, 12, 13))
    )


def test_without_a_context_a_plain_teacher_has_the_students_prompt() -> None:
    plain = teacher_with(ContextConfig(num_successes=1, without_success="plain"))
    asked = request(WRONG, completion=(11, 12))
    (found,) = plain.logprobs([asked])
    (wanted,) = plain.teacher.logprobs([asked])
    assert torch.equal(found, wanted)
    assert plain.pop_metrics() == {"teacher/privileged/frac": 0}


# --- config and check -----------------------------------------------------------------------------


def config_with(world: Path, shows: dict[str, Any], **sections: Any) -> dict[str, Any]:
    teacher = {
        "type": "privileged",
        "context": shows,
        "teacher": sections.pop("inner", {"model": str(world / "teacher")}),
    }
    return run_config(world, Path("unused"), **sections) | {"teacher": teacher}


def findings(config: dict[str, Any]) -> list[tuple[str, str, str]]:
    run = parse_config(config)
    setting = Setting(run, load_tokenizer(run.student.model), 256)
    found = check_teacher(run.teacher, setting)
    return [(f.level, f.subject, f.message) for f in found if "context" in f.subject][1:]


def test_a_template_beside_a_context_is_refused(world: Path) -> None:
    config = config_with(world, {"answer": True})
    config["teacher"]["template"] = "{prompt} {answer}"
    with pytest.raises(UserError, match="only one can make the prompt; remove one"):
        parse_config(config)


def test_what_the_check_says(world: Path) -> None:
    shows = "shows the question with answer, up to 1 correct of the other 2 completions"
    lengths = "up to 27 of 256 tokens"
    assert findings(config_with(world, {"answer": True, "num_successes": 1})) == [
        ("ok", "context", shows),
        ("ok", "privileged context", lengths),
    ]
    (warning, *_) = findings(config_with(world, {"num_successes": 2, "num_failures": 1}))
    assert warning == (
        "warning",
        "context",
        "it wants 3 other completions, but a group has only 2 others (rollout.group_size)",
    )
    (error, *_) = findings(config_with(world, {"fields": ["hint"]}))
    assert error == (
        "error",
        "context",
        "it shows the field 'hint', which the task's problems do not have; use num_successes or "
        "answer, as they have none.",
    )


@pytest.mark.parametrize(
    ("shows", "task", "sentence"),
    [
        (
            {"num_successes": 1, "success_reward": 1.5},
            {},
            "success_reward is 1.5, but the task's rewards are at most 1, so no completion is "
            "ever correct; lower it.",
        ),
        ({"feedback": True, "success_reward": 2.0}, {}, "success_reward is 2, but the task's"),
        (
            {"num_failures": 1, "failure_reward": -1.0},
            {},
            "failure_reward is -1, but the task's rewards are at least 0, so no completion is "
            "ever wrong; raise it, or leave it out.",
        ),
        (
            {"answer": True},
            {"type": "environment", "path": "tiny_environments:Adding"},
            "it shows the reference answer, which none of the 20 problems looked at has; leave "
            "answer out and show something else, such as num_successes = 1.",
        ),
        ({"solution": True}, {}, "it shows the reference solution, which none of the 20 problems"),
        ({"num_successes": 1, "success_reward": 1.0, "failure_reward": 0.0}, {}, ""),
        # The rewards of an environment have no bounds.
        (
            {"num_successes": 1, "success_reward": 3.0},
            {"type": "environment", "path": "tiny_environments:Adding"},
            "",
        ),
    ],
)
def test_a_teacher_that_could_never_speak_is_refused(
    world: Path, shows: dict[str, Any], task: dict[str, Any], sentence: str
) -> None:
    config = config_with(world, shows)
    config["task"] = task or config["task"]
    run = parse_config(config)
    setting = Setting(run, load_tokenizer(run.student.model), 256)
    found = [f for f in check_teacher(run.teacher, setting) if f.level == "error"]
    assert bool(found) == bool(sentence), found
    assert all(one.message.startswith(sentence) for one in found)


def test_peers_that_are_longer_than_the_context(world: Path, tmp_path: Path) -> None:
    """A question of 4 tokens, a request of 8, a completion of at most 4: the bare prompt needs 16,
    and with another completion and its heading of 3 words 23."""
    for size, level in ((15, "error"), (16, "warning"), (22, "warning"), (23, "ok")):
        write_model(tmp_path / str(size), seed=2, max_position_embeddings=size)
        inner = {"model": str(tmp_path / str(size))}
        shows = {"num_successes": 1}
        rollouts = {"max_prompt_tokens": 4}
        (*_, found) = findings(config_with(world, shows, inner=inner, rollout=rollouts))
        assert found[:2] == (level, "privileged context"), found
