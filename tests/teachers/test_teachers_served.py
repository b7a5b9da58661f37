"""A served teacher against a server that is right and one that misbehaves: numbers, self-test,
faults, whole runs."""

import base64
import io
import logging
import math
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import rlad
import rlad.training.run
from conformance_server import FLAWS, ConformanceServer
from rlad.config.file import parse_config
from rlad.config.run import RunConfig
from rlad.errors import RunFailedError
from rlad.findings import Finding
from rlad.models.loading import LanguageModel, load_language_model
from rlad.runs.directory import RunDirectory
from rlad.teachers import check_teacher, make_teacher
from rlad.teachers.base import Setting, TeacherRequest
from rlad.teachers.served.client import CompletionsClient
from rlad.teachers.served.protocol import Scoring, read_generation, read_scores, scoring_request
from rlad.teachers.served.self_test import SelfTest
from rlad.teachers.served.teacher import ServedTeacher
from rlad.teachers.served.token_strings import differing_tokens, probe_ids, spread_ids
from tiny_models import VOCABULARY, random_tokens, tiny_language_model
from tiny_runs import OFTEN_CORRECT, remains, rlad_fails, run_config, write_config

SHORT = {"tolerance": 1e-3, "retry_pause_seconds": 0.005, "num_retries": 2, "timeout_seconds": 20.0}
PROMPTS, COMPLETIONS = random_tokens(4, 1, 9, 6, seed=5), random_tokens(7, 12, 1, 5, seed=6)
REQUESTS = [TeacherRequest(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model(seed=3)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLAD_TEACHER_API_KEY", raising=False)


def config_of(
    *servers: ConformanceServer | str, temperature: float = 1.0, **teacher: Any
) -> RunConfig:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    rollout = {"temperature": temperature, "max_completion_tokens": 20, "max_prompt_tokens": 40}
    served = {"type": "served", "urls": urls, "model": "tiny", **SHORT, **teacher}
    return parse_config(
        {
            "student": {"model": "s"},
            "teacher": served,
            "task": {"type": "arithmetic"},
            "rollout": rollout,
        }
    )


def setting_of(config: RunConfig, model: LanguageModel, *, is_loaded: bool = False) -> Setting:
    return Setting(config, model.tokenizer, 100, model if is_loaded else None)


def found(
    student: LanguageModel,
    *servers: ConformanceServer | str,
    is_loaded: bool = False,
    **settings: Any,
) -> dict[str, Finding]:
    config = config_of(*servers, **settings)
    setting = setting_of(config, student, is_loaded=is_loaded)
    return {finding.subject: finding for finding in check_teacher(config.teacher, setting)}


def error_of(student: LanguageModel, *servers: ConformanceServer | str, **settings: Any) -> Finding:
    """The one error; its message is one sentence for the user."""
    errors = [
        finding
        for finding in found(student, *servers, **settings).values()
        if finding.level == "error"
    ]
    assert len(errors) == 1 and errors[0].message.endswith("."), errors
    return errors[0]


@contextmanager
def teacher_at(
    model: LanguageModel, *servers: ConformanceServer, **settings: Any
) -> Iterator[ServedTeacher]:
    config = config_of(*servers, **settings)
    teacher = make_teacher(config.teacher, setting_of(config, model))
    assert isinstance(teacher, ServedTeacher)
    with closing(teacher):
        yield teacher


@contextmanager
def untested_teacher_at(*servers: ConformanceServer, **settings: Any) -> Iterator[ServedTeacher]:
    """Without the self-test."""
    config = config_of(*servers, **settings)
    client = CompletionsClient(config.teacher)  # pyright: ignore[reportArgumentType]
    setting = setting_of(config, tiny_language_model())
    identity: Any = {"scoring": "prompt_logprobs", "identity": "tiny", "context_tokens": 255}
    with closing(ServedTeacher(client, setting, **identity)) as made:
        yield made


@torch.no_grad()
def wanted(
    model: LanguageModel, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> Tensor:
    """log softmax(logits / T) of each completion token, taken from one unpadded pass."""
    logits = model.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(completion)), completion]


def assert_right(values: list[Tensor], model: LanguageModel, temperature: float = 1.0) -> None:
    for value, request in zip(values, REQUESTS, strict=True):
        expected = wanted(model, [*request.prompt], [*request.completion], temperature)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("understood", get_args(Scoring))
def test_scores_are_those_of_a_local_pass(model, understood):
    """`auto` finds the one way that the server understands."""
    with (
        ConformanceServer(model, understands=(understood,)) as server,
        teacher_at(model, server) as teacher,
    ):
        assert_right(teacher.logprobs(REQUESTS), model)
        assert all(values.dtype == torch.float32 for values in teacher.logprobs(REQUESTS))
        assert ("echo" in server.requests[-1]) == (understood == "echo")
        assert teacher.logprobs([]) == []
        assert not any("seed" in body for body in server.requests)


def test_a_table_is_asked_for_first_and_has_nothing_of_the_prompt(model):
    with ConformanceServer(model, understands=get_args(Scoring)) as server:
        findings = found(model, server)
        assert {finding.level for finding in findings.values()} == {"ok"}
        assert findings["scoring"].message.startswith("by prompt_logprob_token_ids; scores of text")
        assert "not by" not in findings["scoring"].message
        with teacher_at(model, server) as teacher:
            assert_right(teacher.logprobs(REQUESTS), model)
        last = server.requests[-len(REQUESTS) :]
        asked = [(body["prompt"], body["prompt_logprob_token_ids"]) for body in last]
        assert sorted(asked) == sorted(
            ([*r.prompt, *r.completion], [[t] for t in r.completion]) for r in REQUESTS
        )


class WithWrongTables(ConformanceServer):
    def _table(self, tokens: list[int], body: dict[str, Any]) -> str:
        self.flaw = "row ahead"
        table = super()._table(tokens, body)
        self.flaw = ""
        return table


@pytest.mark.parametrize("prefix", ["/v1", "/teachers/v1", "/teachers"])
def test_the_route_of_tables_is_beside_v1(model, prefix):
    only = {"understands": ("prompt_logprob_token_ids",), "prefix": prefix}
    with ConformanceServer(model, **only) as server, teacher_at(model, server) as teacher:
        assert_right(teacher.logprobs(REQUESTS), model)


def test_why_a_better_way_is_not_taken_is_said(model):
    with ConformanceServer(model) as server:
        message = found(model, server)["scoring"].message
        assert message.startswith("by prompt_logprobs; scores of text")
        assert message.endswith(
            f"; not by prompt_logprob_token_ids: http://127.0.0.1:{server.port}/inference/v1/generate"
            " refuses the teacher's requests (HTTP 404: Not Found)"
        )
    with WithWrongTables(model, understands=get_args(Scoring)) as server:
        message = found(model, server)["scoring"].message
        assert message.startswith("by prompt_logprobs; scores of text")
        assert "; not by prompt_logprob_token_ids: the server scores its own text with" in message


@pytest.mark.parametrize("scoring", get_args(Scoring))
def test_a_server_that_tempers_is_used_at_a_temperature(model, scoring):
    with ConformanceServer(model, tempers=True, understands=get_args(Scoring)) as server:
        findings = found(model, server, temperature=0.6, scoring=scoring)
        assert findings["temperature"].message == "0.6: the server applies it (found 0.6000)"
        with teacher_at(model, server, temperature=0.6, scoring=scoring) as teacher:
            assert_right(teacher.logprobs(REQUESTS), model, temperature=0.6)


def test_at_temperature_1_no_word_of_ours_is_sent(model):
    with ConformanceServer(model) as server:
        assert not [f for f in found(model, server).values() if f.level != "ok"]
        assert not any("temper_prompt_logprobs" in body for body in server.requests)


def test_tokens_beyond_the_vocabulary_are_missing_and_not_asked_for(model):
    """A student whose vocabulary is padded can sample them; a server would refuse the request."""
    prompt, completion = PROMPTS[0], [5, 6, VOCABULARY, 7]
    with ConformanceServer(model) as server, teacher_at(model, server) as teacher:
        values, nothing = teacher.logprobs(
            [TeacherRequest(prompt, completion), TeacherRequest(prompt, [VOCABULARY + 3])]
        )
        torch.testing.assert_close(values[:2], wanted(model, prompt, [5, 6]), rtol=0, atol=1e-5)
        assert values.isnan().tolist() == [
            False,
            False,
            True,
            True,
        ] and nothing.isnan().tolist() == [True]
        assert server.requests[-1]["prompt"] == [*prompt, 5, 6]


def test_requests_at_once_are_limited(model):
    with (
        ConformanceServer(model) as server,
        teacher_at(model, server, max_concurrent_requests=3) as teacher,
    ):
        server.lasting_fault, server.slow_seconds, server.max_open = "slow", 0.05, 0
        values = teacher.logprobs(REQUESTS * 4)
        assert server.max_open == 3 and not torch.cat(values).isnan().any()


# --- reading answers ------------------------------------------------------------------------------

NAN = math.nan


def entry(value: Any, token: int = 7) -> dict[str, Any]:
    return {"9": {"logprob": -0.1}, str(token): {"logprob": value, "decoded_token": " seven"}}


@pytest.mark.parametrize(
    ("value", "read"),
    [
        *(
            (-1.5, -1.5),
            (0, 0.0),
            (1e-6, 1e-6),
            (0.5, NAN),
            (NAN, NAN),
            (-math.inf, NAN),
            (-9999.0, NAN),
            (None, NAN),
        ),
        *(("-1.5", NAN), (True, NAN), (10**400, NAN), (-(10**400), NAN), ([-1.0], NAN)),
    ],
)
def test_only_a_finite_logprob_is_a_value(value, read):
    """-9999 is what vLLM writes for -inf."""
    answer = {"choices": [{"prompt_logprobs": [None, entry(value)]}]}
    echo = {
        "choices": [
            {"logprobs": {"tokens": ["token_id:5", "token_id:7"], "token_logprobs": [None, value]}}
        ]
    }
    both: list[tuple[Scoring, Any]] = [("prompt_logprobs", answer), ("echo", echo)]
    for scoring, this in both:
        scores = read_scores(scoring, this, [5, 7])
        assert math.isnan(scores[0].logprob) and str(scores[1].logprob) == str(read)


def test_the_value_of_the_given_token_is_taken_and_no_other():
    answer = {"choices": [{"prompt_logprobs": [None, entry(-2.0), entry(-3.0), None]}]}
    scores = read_scores("prompt_logprobs", answer, [5, 7, 8, 7])
    assert [str(score.logprob) for score in scores] == ["nan", "-2.0", "nan", "nan"]
    assert scores[1].likeliest == {"9": -0.1, "7": -2.0} and scores[1].string == " seven"
    names = ["token_id:5", "token_id:7", "token_id:9", "x"]
    echo = {
        "choices": [{"logprobs": {"tokens": names, "token_logprobs": [None, -1.0, -2.0, -3.0]}}]
    }
    assert [str(score.logprob) for score in read_scores("echo", echo, [5, 7, 8, 3])] == [
        "nan",
        "-1.0",
        "nan",
        "-3.0",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [3]},
        {"choices": [{"prompt_logprobs": None, "logprobs": None}]},
        {
            "choices": [
                {
                    "prompt_logprobs": [None, entry(-1.0)],
                    "logprobs": {"token_logprobs": [None, -1.0]},
                }
            ]
        },
        {
            "choices": [
                {
                    "prompt_logprobs": [None] + [entry(-1.0)] * 3,
                    "logprobs": {"token_logprobs": [None, -1.0, -1.0, -1.0]},
                }
            ]
        },
        {"choices": {"prompt_logprobs": "x"}},
        {"choices": [{"prompt_logprobs": [None, {"7": -4.0}, entry(-1.0)]}]},
    ],
)
def test_an_answer_of_another_length_is_missing_never_shifted(answer):
    for scoring in ("prompt_logprobs", "echo"):
        assert [math.isnan(score.logprob) for score in read_scores(scoring, answer, [5, 7, 7])] == [
            True
        ] * 3


def table(*rows: list[float], dtype: Any = "<f4", end: bytes = b"") -> dict[str, Any]:
    content = io.BytesIO()
    numpy.save(content, numpy.array(rows, dtype=dtype))
    return {"prompt_token_id_logprobs": base64.b64encode(content.getvalue() + end).decode()}


def test_a_table_is_read_by_rows():
    answer = table([-1, -2, -3], [-4, -math.inf, 0])
    _, _, first, second = read_scores("prompt_logprob_token_ids", answer, [5, 6, 7, 8], start=2)
    assert (first.logprob, first.likeliest) == (-1, {"7": -1, "5": -2, "6": -3})
    assert second.logprob == -4 and math.isnan(second.likeliest["5"])


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"prompt_token_id_logprobs": None},
        {"prompt_token_id_logprobs": [-1.0, -1.0]},
        {"prompt_token_id_logprobs": ""},
        {"prompt_token_id_logprobs": "never base64"},
        {"prompt_token_id_logprobs": base64.b64encode(b"\x93NUMPY\x01\x00v\x00").decode()},
        table([-1.0]),
        table([-1.0], [-1.0], [-1.0]),
        table([-1.0], [-1.0], dtype="<f8"),
        table([-1.0], [-1.0], dtype=">f4"),
        table([-1.0], [-1.0], dtype=object),
        {"prompt_token_id_logprobs": table([-1.0], [-1.0])["prompt_token_id_logprobs"][:-4]},
        table([-1.0], [-1.0], end=b"\0\0\0\0"),
    ],
)
def test_another_table_than_the_one_asked_for_is_missing(answer):
    scores = read_scores("prompt_logprob_token_ids", answer, [5, 7, 7])
    assert [str(score.logprob) for score in scores] == ["nan"] * 3


def test_what_is_sent():
    assert scoring_request("prompt_logprob_token_ids", "m", (3, 4, 5, 6), start=2) == {
        "model": "m",
        "token_ids": [3, 4, 5, 6],
        "sampling_params": {
            "temperature": 1.0,
            "max_tokens": 1,
            "prompt_logprob_token_ids": [[5], [6]],
            "prompt_logprob_start": 1,
        },
    }
    assert scoring_request("prompt_logprobs", "m", (3, 4)) == {
        "model": "m",
        "prompt": [3, 4],
        "temperature": 1.0,
        "max_tokens": 1,
        "prompt_logprobs": 0,
    }
    assert scoring_request("echo", "m", [3, 4], temperature=0.5) == {
        "model": "m",
        "prompt": [3, 4],
        "temperature": 0.5,
        "temper_prompt_logprobs": True,
        "max_tokens": 0,
        "echo": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }


def test_written_tokens_are_read_by_their_ids():
    names = ["token_id:4", "token_id:5", "?", "token_id:6"]
    logprobs = {"tokens": names, "token_logprobs": [-1.0, -2, -3, -4]}
    answer = {"choices": [{"logprobs": logprobs}]}
    assert read_generation(answer) == [(4, -1.0), (5, -2.0)]


# --- the self-test --------------------------------------------------------------------------------

SAID = {
    "row ahead": "scores may be shifted by one token",
    "list shifted": "scores may be shifted by one token",
    "nan": "no finite log-prob for 20 of 20 given tokens",
    "missing tokens": "no finite log-prob for 8 of 20 given tokens",
    "one short": "no finite log-prob for 20 of 20 given tokens",
    "wrong ids": "no finite log-prob for 20 of 20 given tokens",
    "other strings": "63 of 63 token ids compared differ, the first is id 0, '<pad>' for the",
    "not repeatable": "the server scores its own text with other log-probs",
    "nothing": "no finite log-prob for 20 of 20 given tokens",
    "zeros": "or be of another text or model",
    "no generation log-probs": "it does not say which tokens it writes",
}


@pytest.mark.parametrize("scoring", get_args(Scoring))
@pytest.mark.parametrize("flaw", [flaw for flaw in FLAWS if flaw != "no strings"])
def test_a_server_that_is_wrong_is_caught(model, flaw, scoring):
    said = SAID[flaw]
    if (flaw, scoring) == ("wrong ids", "prompt_logprob_token_ids"):
        said = SAID["zeros"]  # a table does not name the ids that it scores
    with ConformanceServer(model, flaw=flaw, understands=get_args(Scoring)) as server:
        assert said in error_of(model, server, scoring=scoring).message
        with (
            pytest.raises(ValueError, match="cannot score the student's tokens: "),
            teacher_at(model, server, scoring=scoring),
        ):
            pass


def test_a_token_without_logprob_on_both_sides_is_counted_once(model):
    config = config_of("http://h/v1")
    test = SelfTest(CompletionsClient(config.teacher), setting_of(config, model))  # pyright: ignore[reportArgumentType]
    finding = test.compare("agreement", [math.nan, -1], [math.nan, -1], equal="", otherwise="")
    assert finding.message == "it gives no finite log-prob for 1 of 2 given tokens"


def test_a_right_server_passes_and_says_with_which_errors(model):
    with ConformanceServer(model, root="/models/tiny") as server:
        findings = found(model, server)
        assert {name: finding.level for name, finding in findings.items()} == dict.fromkeys(
            ("server", "context", "scoring", "vocabulary", "temperature"), "ok"
        )
        assert findings["server"].message == f"tiny (/models/tiny) at {server.url}"
        assert "agree with those it gave when writing (mean " in findings["scoring"].message
        assert (
            findings["vocabulary"].message
            == "64 tokens, spread over the student's vocabulary, are the server's"
        )
        with teacher_at(model, server) as teacher:
            assert teacher.identity == "tiny (/models/tiny)"


def test_a_server_without_strings_is_a_warning(model):
    with ConformanceServer(model, flaw="no strings") as server:
        assert found(model, server)["vocabulary"].level == "warning"


def test_a_server_with_fewer_tokens_refuses_the_students(model):
    with ConformanceServer(model) as server:
        server.refusal = lambda body: (
            "Token id 63 is out of vocabulary" if 63 in body["prompt"] else ""
        )
        assert "out of vocabulary" in error_of(model, server).message


def test_temperature_that_the_server_does_not_apply(model):
    with ConformanceServer(model) as server:
        finding = error_of(model, server, temperature=0.8)
        assert finding.subject == "temperature"
        assert (
            "samples at temperature 0.8, but the server's log-probs are those at 1.00; set rollout"
            in finding.message
        )


def test_contexts(model):
    for context, level in ((60, "ok"), (59, "error")):
        with ConformanceServer(model, context=context) as server:
            assert found(model, server)["context"].level == level


def test_a_text_that_fills_the_context_lacks_its_last_value(model):
    """The server writes a token for each text that it scores; a text that leaves no room for it
    would be refused."""
    (prompt,), (completion,) = random_tokens(40), random_tokens(20, seed=1)
    with ConformanceServer(model, context=60) as server, teacher_at(model, server) as teacher:
        values = teacher.logprobs(
            [TeacherRequest(prompt, completion), TeacherRequest(prompt, completion[:19])]
        )
        assert [v.isnan().tolist() for v in values] == [[False] * 19 + [True], [False] * 19]
        torch.testing.assert_close(
            values[0][:19], wanted(model, prompt, completion)[:19], rtol=0, atol=1e-5
        )


def test_the_local_model_is_compared(world):
    teacher, student = (load_language_model(str(world / name)) for name in ("teacher", "student"))
    with ConformanceServer(teacher, tempers=True) as server:
        finding = found(
            student, server, is_loaded=True, local_model=str(world / "teacher"), temperature=0.7
        )["agreement"]
        name = str(world / "teacher")
        assert finding.level == "ok" and f"{server.url} agrees with {name}" in finding.message
        finding = error_of(student, server, is_loaded=True, local_model=str(world / "student"))
        assert finding.subject == "agreement"
        assert f"{server.url} gives other log-probs than" in finding.message


def test_the_local_model_is_loaded_once_on_the_cpu_and_freed(world, monkeypatch):
    """And not before the run's own models are."""
    loaded: list[tuple[weakref.ref[Any], dict[str, Any]]] = []

    def listening(name: str, **settings: Any) -> LanguageModel:
        made = load_language_model(name, **settings)
        loaded.append((weakref.ref(made.model), settings))
        return made

    monkeypatch.setattr("rlad.teachers.served.self_test.load_language_model", listening)
    teacher = load_language_model(str(world / "teacher"))
    with ConformanceServer(teacher) as server:
        found(teacher, server, local_model=str(world / "teacher"))
        assert loaded == []
        nothing = str(world / "nothing")
        message = error_of(teacher, server, local_model=nothing, is_loaded=True).message
        assert "cannot be found or read" in message
        loaded.clear()
        config = config_of(server, local_model=str(world / "teacher"))
        make_teacher(config.teacher, setting_of(config, teacher, is_loaded=True)).close()
    ((model, settings),) = loaded
    assert settings == {"device": "cpu"} and model() is None


def test_replicas_are_compared(model):
    with (
        ConformanceServer(model) as one,
        ConformanceServer(model) as same,
        ConformanceServer(tiny_language_model(seed=4)) as other,
    ):
        assert found(model, one, same)["agreement"].message.startswith(
            f"{one.url} agrees with {same.url} (mean "
        )
        assert (
            f"{one.url} gives other log-probs than {other.url}"
            in error_of(model, one, other).message
        )
        same.name = "renamed"
        assert f"{same.url} offers 'renamed', not 'tiny'" in error_of(model, one, same).message


@pytest.mark.parametrize("contexts", [(256, 15), (15, 256)])
def test_replicas_of_different_contexts_are_compared_up_to_the_shorter(model, contexts):
    """Of the probe's 12 tokens 9 leave room for what a server writes; the first of them has no
    log-prob."""
    one, other = (ConformanceServer(model, context=context) for context in contexts)
    with one, other:
        config = config_of(one, other)
        client = CompletionsClient(config.teacher)  # pyright: ignore[reportArgumentType]
        test = SelfTest(client, setting_of(config, model))
        test.ask_for_model()
        (finding,) = test.compare_with_others()
        assert finding.level == "ok" and finding.message.endswith("over 8 tokens)")


# --- tokens as strings ----------------------------------------------------------------------------


def byte_level() -> PreTrainedTokenizerFast:
    vocabulary = ["<eos>", "a", "Ġa", "ab", "Ċ", "Ã", "Ġ", "ĠĠ", "ab Ã"]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def metaspace() -> PreTrainedTokenizerFast:
    vocabulary = ["<eos>", "▁a", "a", "▁ab", "<0x0A>", "<0xC3>"]
    made = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True)
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


@pytest.mark.parametrize(
    ("make", "tokens", "strings", "num_compared", "num_differing"),
    [
        (byte_level, [0, 1, 2, 3], ["<eos>", "a", " a", "ab"], 4, 0),
        (byte_level, [0, 1, 2, 3], ["<eos>", "a", "Ġa", "ab"], 4, 0),
        (byte_level, [1, 3], ["a", "b"], 2, 1),
        (byte_level, [1, 3], ["ab", "a"], 2, 2),
        (byte_level, [5, 5], ["\ufffd", "Ã"], 0, 0),  # half a character
        (byte_level, [4, 7], ["\n", "  "], 0, 0),
        (byte_level, [1, 3], ["", "ab"], 1, 0),
        (metaspace, [1, 2, 3], ["▁a", "a", "ab"], 3, 0),
        (metaspace, [1, 2, 3], ["a", "a", " ab"], 3, 0),
        (metaspace, [5, 3], ["<0xC3>", "abc"], 1, 1),
    ],
)
def test_surface_forms(make, tokens, strings, num_compared, num_differing):
    compared, differing = differing_tokens(make(), tokens, strings)
    assert (compared, len(differing)) == (num_compared, num_differing)


def test_probes_reach_the_whole_vocabulary(model):
    assert spread_ids(model.tokenizer, 4) == [15, 31, 47, 63] and spread_ids(
        model.tokenizer, 1000
    ) == list(range(64))
    probe = probe_ids(model.tokenizer)  # it has no words of the text
    assert len(set(probe)) == 12


# --- users' mistakes ------------------------------------------------------------------------------


def test_what_users_get_wrong_ends_in_a_sentence(model, monkeypatch):
    with ConformanceServer(model) as server:
        dead = ConformanceServer(model).start()
        dead.kill()
        message = error_of(model, dead).message
        assert message.startswith(f"no usable answer: {dead.url}/models: ")
        assert message.endswith("; start the server, or correct teacher.urls.")
        bare = f"http://127.0.0.1:{server.port}"
        message = error_of(model, bare).message
        assert message.startswith(
            f"{bare}/models refuses the teacher's requests (HTTP 404: Not Found)"
        )
        assert "check teacher.urls, which mostly end in /v1" in message
        message = error_of(model, server, model="tinny").message
        assert (
            message
            == f"{server.url} offers 'tiny', not 'tinny'; set teacher.model to what it offers."
        )
        server.key = "right"
        assert (
            "the environment variable RLAD_TEACHER_API_KEY is not set"
            in error_of(model, server).message
        )
        monkeypatch.setenv("RLAD_TEACHER_API_KEY", "wrong")
        assert (
            "RLAD_TEACHER_API_KEY holds a key that it does not take"
            in error_of(model, server).message
        )
        monkeypatch.setenv("MY_KEY", " right\n")
        assert found(model, server, api_key_variable="MY_KEY")["scoring"].level == "ok"


def test_a_server_that_is_no_model_server(model):
    with ConformanceServer(model) as server:
        server.models = lambda: {"hello": "world"}
        assert f"{server.url} offers no model, not 'tiny'" in error_of(model, server).message
    with ConformanceServer(model, understands=()) as server:
        message = error_of(model, server).message
        assert (
            "prompt_logprobs: it gives no finite" in message
            and "echo: it gives no finite" in message
        )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"urls": ["127.0.0.1:8000/v1"]},
            r"urls\[0\] is wrong: it must be an address such as http://127.0.0.1:8000/v1",
        ),
        ({"urls": ["http:///v1"]}, "must be an address"),
        ({"urls": ["http://h:port/v1"]}, "must be an address"),
        ({"urls": ["http://h:65536/v1"]}, "must be an address"),
        ({"urls": ["http://h:8٠/v1"]}, "must be an address"),
        ({"urls": ["http://[1]/v1"]}, "must be an address"),
        ({"urls": ["http://256.1.1.1/v1"]}, "must be an address"),
        ({"urls": ["http://h/v 1"]}, "must be an address"),
        ({"urls": ["ftp://h/v1"]}, "must be an address"),
        ({"urls": ["http://me:secret@h/v1"]}, "may hold no user, password, query or fragment"),
        ({"urls": ["http://h/v1?key=secret"]}, "may hold no user, password, query or fragment"),
        ({"urls": []}, "urls is"),
        ({"urls": ["http://h/v1", "http://h/v1/"]}, "urls names a replica twice"),
        (
            {"api_key_variable": "sk-secret"},
            "must be the name of an environment variable, in capitals, not the key itself",
        ),
        ({"timeout_seconds": 0.0}, "timeout_seconds is 0.0"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests is 0"),
    ],
)
def test_settings_that_cannot_be(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        config_of("http://h/v1", **settings)
    assert "secret" not in str(error.value)


def test_a_slash_at_the_end_does_not_matter():
    assert config_of("http://h/v1/").teacher.urls == ("http://h/v1",)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


# --- the key --------------------------------------------------------------------------------------


def test_the_key_is_nowhere(world, tmp_path, monkeypatch, caplog):
    """Not in the run directory, nor in a log at any level, an exception, a representation; also
    where a server repeats it."""
    key = "sk-2718281828"
    monkeypatch.setenv("RLAD_TEACHER_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    teacher = load_language_model(str(world / "teacher"))
    with ConformanceServer(teacher, key=key, repeats_key=True) as server:
        config = run_config(world, tmp_path / "run", teacher=served(server))
        assert rlad.train(config).run_dir.is_dir()
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert len(files) > 10 and not any(key.encode() in path.read_bytes() for path in files)
        client = CompletionsClient(config_of(server).teacher)  # pyright: ignore[reportArgumentType]
        assert key not in repr((client, vars(client), client.key))
        with pytest.raises(TypeError):
            pickle.dumps(client)
        server.key = "another"
        message = error_of(teacher, server).message
        assert "Incorrect API key provided: Bearer ***" in message and key not in message
    assert key not in caplog.text and "HTTP Request" in caplog.text


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(model, monkeypatch, key):
    monkeypatch.setenv("RLAD_TEACHER_API_KEY", key)
    with pytest.raises(
        ValueError, match="environment variable RLAD_TEACHER_API_KEY holds"
    ) as error:
        found(model, "http://127.0.0.1:9/v1")
    assert key not in str(error.value)


def test_the_key_over_plain_http_to_another_machine_is_a_warning(model, monkeypatch):
    monkeypatch.setenv("RLAD_TEACHER_API_KEY", "k")
    for url, num in (
        ("http://127.0.0.1:1/v1", 0),
        ("http://localhost:1/v1", 0),
        ("https://h/v1", 0),
        ("http://h/v1", 1),
    ):
        config = config_of(url)
        client = CompletionsClient(config.teacher)  # pyright: ignore[reportArgumentType]
        monkeypatch.setattr(client, "ask", lambda *_: {"data": [{"id": "tiny"}]})
        findings = SelfTest(client, setting_of(config, model)).findings("server")
        assert [finding.level for finding in findings].count("warning") == num


def test_no_proxy_sees_what_stays_on_this_machine(model, monkeypatch):
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with ConformanceServer(model) as server:
        config = config_of(server, "http://elsewhere.invalid/v1")
        client = CompletionsClient(config.teacher)  # pyright: ignore[reportArgumentType]
        assert client.ask(server.url, "/models")["data"]


# --- faults ---------------------------------------------------------------------------------------

PASSING = ["500", "429", "truncated", "closed", "not JSON", "list", "deep", "huge"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_costs_a_retry_and_no_value(model, fault):
    with ConformanceServer(model) as server, untested_teacher_at(server) as teacher:
        num_before = len(server.requests)
        server.faults.extend([fault, fault])
        assert_right(teacher.logprobs(REQUESTS), model)
        assert len(server.requests) - num_before == len(REQUESTS) + 2


@pytest.mark.parametrize("fault", PASSING)
def test_a_lasting_fault_leaves_nan(model, fault):
    with ConformanceServer(model) as server, untested_teacher_at(server) as teacher:
        server.lasting_fault = fault
        values = teacher.logprobs(REQUESTS[:2])
        assert [len(v) for v in values] == [7, 12] and torch.cat(values).isnan().all()


@pytest.mark.parametrize("fault", ["slow", "dripping"])
def test_what_takes_longer_than_the_timeout_is_given_up(model, fault):
    with (
        ConformanceServer(model) as server,
        untested_teacher_at(server, timeout_seconds=0.5, num_retries=1) as teacher,
    ):
        server.faults.append(fault)
        started = time.monotonic()
        assert_right(teacher.logprobs(REQUESTS), model)
        assert 0.5 <= time.monotonic() - started < 3


def test_a_huge_answer_is_not_read_to_its_end(model):
    with ConformanceServer(model) as server, untested_teacher_at(server) as teacher:
        server.faults.append("huge")
        assert_right(teacher.logprobs(REQUESTS), model)
        time.sleep(0.1)
        assert server.counts["huge MiB"] < 50


@pytest.mark.parametrize("fault", ["401", "404", "400", "307"])
def test_a_refusal_for_good_stops_the_run(model, fault):
    with ConformanceServer(model) as server, untested_teacher_at(server) as teacher:
        server.lasting_fault, num_before = fault, len(server.requests)
        with pytest.raises(
            RunFailedError, match=rf"/completions refuses the teacher's requests \(HTTP {fault}"
        ) as error:
            teacher.logprobs(REQUESTS[:1])
        assert str(error.value).endswith(".") and len(server.requests) == num_before + 1


def test_a_request_that_alone_fails_does_not_end_the_patience_of_others(model):
    """One prompt chokes the server for good; another is answered at the last try."""
    with (
        ConformanceServer(model) as server,
        untested_teacher_at(server, max_concurrent_requests=1) as teacher,
    ):
        respond = server.completion

        def choke(body: dict[str, Any]) -> dict[str, Any]:
            if body["prompt"][: len(PROMPTS[0])] == PROMPTS[0]:
                return {"choices": []}
            return respond(body)

        server.completion = choke
        server.faults.extend(["500"] * 2)
        values = teacher.logprobs([REQUESTS[1], REQUESTS[0], REQUESTS[2]])
        assert values[1].isnan().all() and not torch.cat([values[0], values[2]]).isnan().any()


def test_once_one_request_has_waited_in_vain_the_others_wait_no_more(model):
    with (
        ConformanceServer(model) as server,
        untested_teacher_at(
            server, max_concurrent_requests=1, num_retries=4, retry_pause_seconds=0.1
        ) as teacher,
    ):
        server.kill()
        started = time.monotonic()
        values = teacher.logprobs(REQUESTS * 5)
        assert torch.cat(values).isnan().all()
        assert 1.5 <= time.monotonic() - started < 3.0  # .1 + .2 + .4 + .8 once, with jitter


def test_interrupting_does_not_wait_for_retries_or_answers(model):
    """What a second Ctrl-C does in mid-run."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        for is_dead in (True, False):
            with (
                ConformanceServer(model) as server,
                untested_teacher_at(server, retry_pause_seconds=30.0) as teacher,
            ):
                if is_dead:
                    server.kill()
                server.lasting_fault, server.slow_seconds = "slow", 8.0
                started = time.monotonic()
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                with pytest.raises(KeyboardInterrupt):
                    teacher.logprobs(REQUESTS)
                assert time.monotonic() - started < 2.0
                if is_dead:
                    server.start()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


# --- replicas -------------------------------------------------------------------------------------


def test_replicas_share_the_work(model):
    with (
        ConformanceServer(model) as one,
        ConformanceServer(model) as two,
        untested_teacher_at(one, two) as teacher,
    ):
        for server in (one, two):
            server.requests.clear()
            server.lasting_fault, server.slow_seconds = "slow", 0.02
        assert_right(teacher.logprobs(REQUESTS * 4)[:4], model)
        assert min(len(one.requests), len(two.requests)) >= 5


def test_a_replica_stands_in_for_another_that_is_tried_again_later(model, caplog):
    with (
        ConformanceServer(model) as one,
        ConformanceServer(model) as two,
        untested_teacher_at(one, two, num_retries=0) as teacher,
    ):
        one.kill()
        assert_right(teacher.logprobs(REQUESTS), model)
        one.start()
        one.requests.clear()
        assert_right(teacher.logprobs(REQUESTS), model)
        assert not one.requests, "it rests"
        teacher._client.rests_until[one.url] = time.monotonic()  # half a minute later
        assert_right(teacher.logprobs(REQUESTS), model)
        assert one.requests
        assert [
            record.message.split(": ")[0]
            for record in caplog.records
            if record.levelno == logging.WARNING
        ] == [
            "the teacher's server does not answer, waiting for it",
            f"the teacher's server at {one.url} answers again",
        ]


# --- whole runs -----------------------------------------------------------------------------------


def served(*servers: ConformanceServer, **settings: Any) -> dict[str, Any]:
    return {
        "type": "served",
        "urls": [server.url for server in servers],
        "model": "tiny",
        **SHORT,
        **settings,
    }


@pytest.fixture
def server(world: Path) -> Iterator[ConformanceServer]:
    with ConformanceServer(load_language_model(str(world / "teacher"))) as server:
        yield server


class Behind(rlad.training.reporter.Reporter):
    """Does something after a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.at, self.action = step, action

    def step(self, result: Any, num_steps: int) -> None:
        if result.step == self.at:
            self.action()


def test_a_run_with_a_served_teacher_is_the_run_with_the_local_one(world, tmp_path, server):
    local = rlad.train(run_config(world, tmp_path / "local", task=OFTEN_CORRECT)).run_dir
    other = rlad.train(
        run_config(world, tmp_path / "served", teacher=served(server), task=OFTEN_CORRECT)
    ).run_dir
    wanted_rows, rows = (list(RunDirectory(path).read("metrics.jsonl")) for path in (local, other))
    assert len(rows) == 4 and any(
        row["teacher/log_ratio/mean"] for row in rows if "teacher/log_ratio/mean" in row
    )
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        assert row.keys() == wanted_row.keys() | {"teacher/overlap/seconds"}
        for name in wanted_row:
            if not name.startswith(("time/", "memory/")):
                assert row[name] == pytest.approx(wanted_row[name], rel=1e-4, abs=1e-5), name
    ours, theirs = (
        load_file(RunDirectory(path).checkpoint(4) / "model.safetensors") for path in (other, local)
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_a_run_survives_a_restart_of_the_server(world, tmp_path, server):
    config = run_config(
        world,
        tmp_path / "whole" / "run",
        teacher=served(server, num_retries=6, retry_pause_seconds=0.05),
    )
    rlad.train(config)

    def restart() -> None:
        server.kill()
        threading.Timer(0.6, server.start).start()

    config["run_dir"] = str(tmp_path / "restarted" / "run")
    rlad.train(config, reporter=Behind(1, restart))
    assert remains(tmp_path / "restarted" / "run") == remains(tmp_path / "whole" / "run")


def test_a_run_without_its_server_stops_and_goes_on_with_resume(world, tmp_path, server):
    # `opd` asks its teacher about every completion, whatever the verifier says.
    run_dir = tmp_path / "whole" / "run"
    config = run_config(world, run_dir, teacher=served(server), objective={"type": "opd"})
    rlad.train(config)
    config["run_dir"] = str(tmp_path / "stopped" / "run")
    with pytest.raises(
        RunFailedError,
        match=r"step 4: the teacher gave no finite log-prob for 100\.0% of the tokens",
    ):
        rlad.train(config, reporter=Behind(3, server.kill))
    assert RunDirectory(tmp_path / "stopped" / "run").checkpoints()[-1][0] == 3
    server.start()
    rlad.train(config, resume=True)
    assert remains(tmp_path / "stopped" / "run") == remains(tmp_path / "whole" / "run")


def test_a_refusal_in_mid_run_stops_it_with_a_checkpoint(world, tmp_path, server):
    config = run_config(world, tmp_path / "run", teacher=served(server), task=OFTEN_CORRECT)
    with pytest.raises(RunFailedError, match="HTTP 401: no, 401"):
        rlad.train(config, reporter=Behind(1, lambda: setattr(server, "lasting_fault", "401")))
    assert RunDirectory(tmp_path / "run").checkpoints()[-1][0] == 1


def test_a_resumed_run_must_find_the_same_teacher(world, tmp_path, server):
    config = run_config(world, tmp_path / "run", teacher=served(server), task=OFTEN_CORRECT)
    with pytest.raises(RunFailedError):
        rlad.train(config, reporter=Behind(1, lambda: setattr(server, "lasting_fault", "401")))
    server.lasting_fault, server.root = "", "/models/another"
    with pytest.raises(
        ValueError, match=r"trained with teacher 'tiny', not 'tiny \(/models/another\)'"
    ):
        rlad.train(config, resume=True)


def test_on_the_command_line(world, tmp_path, server):
    toml = write_config(
        tmp_path / "run.toml",
        run_config(world, tmp_path / "run", teacher=served(server, model="tinny")),
    )
    for verb in ("check", "train"):
        if verb == "train":
            assert "offers 'tiny', not 'tinny'" in rlad_fails(verb, toml)
    server.kill()
    toml = write_config(
        tmp_path / "run.toml", run_config(world, tmp_path / "run", teacher=served(server))
    )
    assert "start the server, or correct teacher.urls." in rlad_fails("train", toml)
    assert not (tmp_path / "run").exists()
    server.start()
