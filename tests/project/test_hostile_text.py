"""Text of models, servers and files: what reads it neither fails nor hangs nor is fooled, what
shows it shows text alone."""

import importlib.util
import io
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, seed, settings
from rich.console import Console

import hostile_targets
import rlad
from hostile_targets import NEEDS, TARGETS
from hostile_texts import UNITS
from rlad.cli.evaluate import print_summary
from rlad.cli.main import main
from rlad.cli.printing import print_line
from rlad.cli.sample import print_preview
from rlad.comparison.report import markdown
from rlad.config.template import template_names
from rlad.runs.directory import RunDirectory
from rlad.runs.rows import ProblemResult
from rlad.runs.statistics import Estimate
from rlad.tasks.answers import (
    boxed_answer,
    final_answer,
    first_line,
    marked_answer,
    normalised,
    outside_thoughts,
)
from rlad.tasks.base import Verdict, text_key
from rlad.tasks.logic import KnightsAndKnaves, logic_rl_reward, parse_answer
from rlad.tasks.notation import plain_notation, without_wrapping
from rlad.tasks.numbers import read_number
from rlad.tasks.reasoning_gym import _is_harmless
from rlad.tasks.verifiers import exact, make_verifier, number
from rlad.tasks.worker import Worker
from rlad.tasks.written_numbers import evaluate_arithmetic
from rlad.teachers.served.protocol import read_generation
from rlad.text import printable
from rlad.training.console import ConsoleReporter
from tiny_runs import run_config

EVIL = "\x1b]0;taken\x07\x1b[2J\x9b31m\u202e\u2066\rknight[/red][bold]\u0085\x08"


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    hostile_targets.close()


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_inputs(name):
    if importlib.util.find_spec(NEEDS.get(name, "rlad")) is None:
        pytest.skip(f"needs the optional package {NEEDS[name]}")
    target = TARGETS[name]
    few = settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    seed(1)(few(given(target.inputs)(target.check)))()


# --- time -----------------------------------------------------------------------------------------

READERS: dict[str, Callable[[str], object]] = {
    "exact": lambda text: exact(text, "42"),
    "number": lambda text: number(text, "42"),
    "parse_answer": lambda text: parse_answer("Answer: " + text),
    "logic_rl_reward": lambda text: logic_rl_reward(text, {"ada": True}),
    "marked_answer": marked_answer,
    "boxed_answer": boxed_answer,
    "final_answer": final_answer,
    "normalised": normalised,
    "read_number": read_number,
    "read_number of prose": lambda text: read_number(text, is_marked=False),
    "outside_thoughts": outside_thoughts,
    "first_line": first_line,
    "without_wrapping": without_wrapping,
    "plain_notation": plain_notation,
    "evaluate_arithmetic": lambda text: evaluate_arithmetic(text[:500]),
    "list of reasoning-gym": lambda text: _is_harmless(text, "n_queens"),
    "formula of reasoning-gym": lambda text: _is_harmless(text, "simple_integration"),
    "text_key": text_key,
    "markdown": markdown,
    "printable": printable,
    "template": lambda text: _refused(template_names, text),
}
LENGTH = 10_000


def _refused(read: Callable[[str], object], text: str) -> None:
    with suppress(ValueError):
        read(text)


def seconds(read: Callable[[str], object], text: str) -> float:
    began = time.process_time()  # of this process alone: others may be busy
    read(text)
    return time.process_time() - began


@pytest.mark.parametrize("name", READERS)
def test_twice_the_text_takes_twice_the_time(name):
    """No pattern goes back over what it has read: also with an end at which it cannot match."""
    read = READERS[name]
    for unit in UNITS:
        for head, tail in (("", ""), ("", "!"), ("Answer: ", "\x00x")):
            long, double = (head + unit * (n // len(unit)) + tail for n in (LENGTH, 2 * LENGTH))
            if (slow := seconds(read, double)) > 0.1:  # what is quadratic takes seconds for so much
                quick = min(seconds(read, long) for _ in range(2))
                assert slow < 3 * quick + 0.1, (name, unit, quick, slow)


@pytest.mark.parametrize(
    "unit", ["a", "Answer: 1\n", r"\boxed{", "{", "<answer>", "1,000,", "\x1b[2J", "\u0131s a "]
)
def test_megabytes(unit):
    completion = unit * (4 * 2**20 // len(unit))
    task = KnightsAndKnaves(num_people=[2])
    began = time.monotonic()
    for judgement in (
        exact(completion, "x"),
        number(completion, "7"),
        task.judge(task.problem("train", 0), completion),
    ):
        assert judgement.verdict == Verdict.WRONG
    assert time.monotonic() - began < 5


# --- a verifier's process -------------------------------------------------------------------------


def test_memory_is_bounded_and_costs_one_completion():
    verifier = make_verifier(
        "user_verifiers:by_completion", timeout_seconds=20, max_memory_gib=0.25
    )
    try:
        for _ in range(2):
            judgement = verifier.judge("eat", "42")
            assert (judgement.verdict, judgement.reason) == (
                Verdict.CANNOT_JUDGE,
                "it needs more than 0.25 GiB of memory",
            )
            assert verifier.judge("42", "42").verdict == Verdict.CORRECT
    finally:
        verifier.close()


def test_a_run_goes_on_whatever_its_verifier_does(world, tmp_path):
    """Each completion of several words hangs, eats memory, dies or raises."""
    result = rlad.train(
        run_config(
            world,
            tmp_path / "run",
            task={
                "verifier": "user_verifiers:trouble_with_words",
                "timeout_seconds": 0.5,
                "max_memory_gib": 0.25,
            },
            rollout={"prompts_per_batch": 2, "group_size": 3},
            optimization={"num_steps": 1},
            evaluation={
                "num_validation_samples": 1,
                "num_test_samples": 1,
                "num_validation_problems": 1,
                "num_test_problems": 1,
            },
        )
    )
    (row,) = RunDirectory(result.run_dir).read("metrics.jsonl")
    assert row["reward/cannot_judge/frac"] > 0


def test_a_silent_process_prints_nothing(capfd):
    for is_silent in (False, True):
        worker = Worker(print, timeout_seconds=20, is_silent=is_silent)
        worker.call(EVIL)
        worker.close()
        printed = capfd.readouterr()
        assert not printed.out and (EVIL.strip("\n") in printed.err) is not is_silent


# --- what was found -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word", ["kn\u0131ght", "KN\u0130GHT", "kn\u200bight", "\u212anight\u0131"]
)
def test_what_only_looks_like_a_knight_is_no_knave(word):
    """A pattern that ignores case takes a dotless i for an i; the answer cannot be read whole."""
    assert parse_answer(f"Answer: Ada is a {word}, Ben is a knave") is None


def test_an_endless_token_id_is_no_token():
    choice = {"logprobs": {"tokens": ["token_id:" + "9" * 5000], "token_logprobs": [-1.0]}}
    assert read_generation({"choices": [choice]}) == []


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 100_000, "[a" + ".a" * 5000 + "]\nx = 1", 'x = "\ud800"']
)
def test_config_files_that_are_deep_or_no_text(tmp_path, text):
    (tmp_path / "run.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    result = CliRunner().invoke(main, ["check", str(tmp_path / "run.toml")])
    assert (
        result.exit_code == 2 and result.stderr.startswith("rlad: ") and len(result.stderr) < 20_000
    )


# --- the terminal ---------------------------------------------------------------------------------


def is_plain(shown: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in shown)


def shown_by(show: Callable[[Console], object]) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def problem_result(difficulty: str) -> ProblemResult:
    return ProblemResult(
        index=0,
        key="key",
        difficulty=difficulty,
        num_samples=2,
        num_correct=1,
        num_cannot_judge=0,
        num_truncated=0,
        mean_completion_tokens=1.0,
        prompt="",
        first_completion="",
    )


def test_terminals_get_text_alone():
    row = {
        **dict.fromkeys(("student", "prompt", "completion", "reason"), EVIL),
        **{"verdict": "wrong", "reward": 0.0, "is_truncated": False, "tokens": [EVIL]},
        **{"student_logprobs": [-1.0], "teacher_logprobs": [-2.0]},
    }
    about = {"model": EVIL, "task": "jsonl", "split": "test"}
    results = [problem_result(EVIL), problem_result("[/x]")]
    for show in (
        lambda console: print_preview([row], console),
        lambda console: print_summary(about, results, console),
        lambda console: print_line(console, EVIL),
        lambda console: ConsoleReporter(console).evaluated("test", 1, Estimate(0.5, 0.4, 0.6)),
        lambda console: ConsoleReporter(console)._print(EVIL),
    ):
        assert is_plain(shown_by(show))
    assert "[/x]" in shown_by(lambda console: print_summary(about, results, console))


def test_an_error_of_the_command_line_is_text_alone(tmp_path):
    folder = tmp_path / "model\x1b[2J\u202e"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "\\u001b[31mevil\\u202e"}')
    for verb in ("train", "check"):
        result = CliRunner().invoke(
            main, [verb, f"student.model={folder}", f"run_dir={tmp_path / 'run'}"]
        )
        assert result.exit_code == 2 and is_plain(result.stderr) and is_plain(result.stdout), (
            result.output
        )
