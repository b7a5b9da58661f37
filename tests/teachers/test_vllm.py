"""The served teacher against the real vLLM, on the CPU: its numbers, and its death in mid-training.

Needs an environment with vLLM and rlad (`.ci/vllm-environment`), whose Python `RLAD_VLLM_PYTHON`
names. The models are a tiny Llama, and SmolLM2-135M where `rlad models prepare smollm2-135m` has
put it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import rlad
from exported_runs import LENGTH, LORA, PROMPTS, answers, checkpoint, write_run
from rlad.config.file import parse_config
from rlad.export.model import export_model
from rlad.models.loading import load_language_model
from rlad.models.packaged import PACKAGED
from rlad.runs.directory import RunDirectory
from rlad.teachers import check_teacher, make_teacher, setting_of
from rlad.teachers.base import TeacherRequest
from running_servers import free_port, server_process, wait_for
from tiny_models import tiny_model
from tiny_runs import FILES, PROBLEMS, run_config, write_config, write_model
from triton_on_cpu import environment_with_triton

VLLM_PYTHON, SMOLLM2 = os.environ.get("RLAD_VLLM_PYTHON"), PACKAGED["smollm2-135m"]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not VLLM_PYTHON,
        reason="set RLAD_VLLM_PYTHON to what `.ci/vllm-environment DIRECTORY` prints",
    ),
]
START_SECONDS = 600
STEPS = 30


@dataclass(frozen=True)
class World:
    """A teacher that vLLM can serve, a tiny student with its tokenizer, files of problems, and the
    port of the server."""

    folder: Path
    teacher: Path
    student: Path
    port: int

    @contextmanager
    def vllm(self, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """The server that `rlad serve-teacher` starts, ready. Killed with `os.killpg` it leaves
        nothing behind."""
        assert VLLM_PYTHON is not None
        command = [
            VLLM_PYTHON,
            "-m",
            "rlad",
            "serve-teacher",
            str(self.teacher),
            "--engine",
            "vllm",
            "--port",
            str(self.port),
        ]
        command += ["--served-name", "it", "--max-context-tokens", "256"]
        log = self.folder / "vllm.log"
        with server_process(
            command, self.port, log, seconds=START_SECONDS, environment=environment
        ) as process:
            yield process

    def config(self, run_dir: Path, **sections: Any) -> dict[str, Any]:
        sections = {
            "rollout": {"max_prompt_tokens": 128},
            "optimization": {"num_steps": STEPS},
            "objective": {"type": "opd"},  # asks about every completion, right or wrong
            **sections,
        }
        return run_config(self.folder, run_dir, student={"model": str(self.student)}, **sections)

    def served_config(self, run_dir: Path, **settings: Any) -> dict[str, Any]:
        teacher = {
            "type": "served",
            "urls": [f"http://127.0.0.1:{self.port}/v1"],
            "model": "it",
            "tolerance": 1e-3,
        }
        return self.config(run_dir, teacher=teacher | settings)

    def local_config(self, run_dir: Path) -> dict[str, Any]:
        return self.config(run_dir, teacher={"model": str(self.teacher)})


def write_problems(folder: Path) -> Path:
    for name, problems in FILES.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(problem) + "\n" for problem in problems)
        )
    return folder


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A vocabulary of 7 words."""
    folder = write_problems(tmp_path)
    # vLLM's attention on the CPU wants heads of 32 numbers or more.
    teacher = write_model(folder / "teacher", seed=2, hidden_size=64, head_dim=32)
    return World(folder, teacher, write_model(folder / "student", seed=1), free_port())


@pytest.fixture
def smollm2(tmp_path: Path) -> World:
    """SmolLM2 as the teacher of a student of its vocabulary."""
    if not SMOLLM2.is_ready:
        pytest.skip("run `rlad models prepare smollm2-135m` first")
    student, tokenizer = tmp_path / "student", AutoTokenizer.from_pretrained(SMOLLM2.folder)
    sizes = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tiny_model(seed=1, **sizes).save_pretrained(student)
    tokenizer.save_pretrained(student)
    return World(write_problems(tmp_path), SMOLLM2.folder, student, free_port())


NEEDS_RUNNER = "prompt_logprob_token_ids requires the V2 model runner"


# The larger model takes too long in Triton's interpreter.
@pytest.mark.parametrize(("which", "runner"), [("world", "v1"), ("smollm2", "v1"), ("world", "v2")])
def test_scores_of_vllm_are_those_of_transformers(which, runner, request, tmp_path):
    """vLLM's newer model runner scores tables of token ids, too; the older one says why not."""
    world: World = request.getfixturevalue(which)
    environment = environment_with_triton(tmp_path / "triton") if runner == "v2" else None
    student = load_language_model(str(world.student))
    prompts = [student.tokenizer(problem["prompt"])["input_ids"] for problem in PROBLEMS]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(
        2, len(student.tokenizer), (len(prompts), 40), generator=generator
    ).tolist()
    requests = [
        TeacherRequest(p, w[: 4 * i + 4])
        for i, (p, w) in enumerate(zip(prompts, words, strict=True))
    ]

    found: dict[str, str] = {}

    def scores(config: dict[str, Any]) -> torch.Tensor:
        run = parse_config(config)
        setting = setting_of(run, student)
        findings = check_teacher(run.teacher, setting)
        assert [finding for finding in findings if finding.level == "error"] == []
        found.update({finding.subject: finding.message for finding in findings})
        teacher = make_teacher(run.teacher, setting)
        values = teacher.logprobs(requests)
        teacher.close()
        assert [len(v) for v in values] == [len(request.completion) for request in requests]
        return torch.cat(values)

    local = scores(world.local_config(tmp_path / "run"))
    with world.vllm(environment):
        for scoring in ("prompt_logprobs", "echo", "auto"):
            served = scores(
                world.served_config(
                    tmp_path / "run", scoring=scoring, local_model=str(world.teacher)
                )
            )
            error = (served - local).abs()
            print(
                f"{scoring}: mean {error.mean():.2g}, max {error.max():.2g} nats over {len(error)} "
                "tokens"
            )
            assert error.max() < 1e-3  # false for NaN
    # The last one asked was `auto`.
    taken = "prompt_logprobs" if runner == "v1" else "prompt_logprob_token_ids"
    assert found["scoring"].startswith(f"by {taken}; ")
    assert (NEEDS_RUNNER in found["scoring"]) == (runner == "v1")


@pytest.mark.parametrize(("runner", "support"), [("v1", "teacher_top_k"), ("v2", "student_top_k")])
def test_columns_of_vllm_are_those_of_transformers(runner, support, world, tmp_path):
    """The older runner has no tables of ids, and says so before training."""
    environment = environment_with_triton(tmp_path / "triton") if runner == "v2" else None
    student = load_language_model(str(world.student))
    prompts = [student.tokenizer(problem["prompt"])["input_ids"] for problem in PROBLEMS]
    generator = torch.Generator().manual_seed(0)
    size = (len(prompts), 20)
    words = torch.randint(2, len(student.tokenizer), size, generator=generator).tolist()
    requests = [TeacherRequest(p, w) for p, w in zip(prompts, words, strict=True)]
    ids = None
    if support == "student_top_k":
        scores = torch.rand(20 * len(prompts), len(student.tokenizer), generator=generator)
        ids = scores.topk(3).indices

    def findings(config: dict[str, Any]) -> dict[str, str]:
        run = parse_config(config)
        found = check_teacher(run.teacher, setting_of(run, student))
        return {one.subject: one.message for one in found if one.level == "error"}

    def columns(config: dict[str, Any]) -> Any:
        run = parse_config(config)
        with closing(make_teacher(run.teacher, setting_of(run, student))) as teacher:
            return teacher.columns(requests, top_k=3, ids=ids)

    objective = {"type": "gkd", "support": support, "top_k": 3}
    local = columns(world.local_config(tmp_path / "run") | {"objective": objective})
    with world.vllm(environment):
        config = world.served_config(tmp_path / "run") | {"objective": objective}
        served = columns(config)
        if runner == "v1":
            config["objective"] = objective | {"support": "student_top_k"}
            assert NEEDS_RUNNER in findings(config)["columns"]
    assert torch.equal(served.ids, local.ids)
    error = (served.logprobs - local.logprobs).abs().max()
    print(f"{support}: max {error:.2g} nats over {served.logprobs.numel()} numbers")
    assert error < 1e-4


def test_training_survives_the_death_of_the_server(world, tmp_path):
    """One run waits until the server is back; another does not wait, stops cleanly and is resumed.
    Both end as with a local teacher."""
    patient = tmp_path / "patient"
    hasty = tmp_path / "hasty"
    waits = {"num_retries": 30, "retry_pause_seconds": 2.0}
    with world.vllm() as server:
        patient_run = start_training(tmp_path, world.served_config(patient, **waits))
        hasty_run = start_training(tmp_path, world.served_config(hasty, num_retries=0))
        try:
            wait_for(
                lambda: all(map(is_under_way, (patient, hasty), (patient_run, hasty_run))),
                seconds=300,
            )
            os.killpg(server.pid, signal.SIGKILL)
            assert patient_run.poll() is None and hasty_run.poll() is None, (
                "the server was killed too late"
            )
            _, said = hasty_run.communicate(timeout=300)
            assert hasty_run.returncode == 1 and "Traceback" not in said, said
            assert "resume the run" in said and str(world.port) in said, said
            assert 2 <= num_steps(hasty) < STEPS
            assert patient_run.poll() is None and num_steps(patient) < STEPS
            with world.vllm():
                resumed = start_training(
                    tmp_path, world.served_config(hasty, num_retries=0), "--resume"
                )
                for run in (resumed, patient_run):
                    _, said = run.communicate(timeout=600)
                    assert run.returncode == 0, said
        finally:
            for run in (patient_run, hasty_run):
                run.kill()
                run.wait()
    local = metrics(rlad.train(world.local_config(tmp_path / "local")).run_dir)
    assert [row["step"] for row in local] == list(range(1, STEPS + 1))
    for run in (patient, hasty):
        rows = metrics(run)
        assert [row["step"] for row in rows] == [row["step"] for row in local]
        for ours, theirs in zip(rows, local, strict=True):
            for name in ("loss", "teacher/log_ratio/mean", "reward/mean"):
                assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-3), (
                    run.name,
                    ours["step"],
                    name,
                )


@pytest.mark.parametrize(
    "lora", [None, pytest.param(LORA, marks=pytest.mark.peft)], ids=["full", "lora"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_exported_model_answers_as_in_transformers(tmp_path, lora, tied):
    run = write_run(
        tmp_path, lora=lora, sizes={"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": tied}
    )
    folder = export_model(str(run))
    trained: Any = load_language_model(str(checkpoint(run)), device="cpu").model
    command = [str(VLLM_PYTHON), str(Path(__file__).parents[1] / "vllm_answers.py"), str(folder)]
    asked = json.dumps({"prompts": PROMPTS, "length": LENGTH})
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == answers(trained)


def start_training(folder: Path, config: dict[str, Any], *flags: str) -> "subprocess.Popen[str]":
    path = write_config(folder / f"{Path(config['run_dir']).name}.toml", config)
    command = [sys.executable, "-m", "rlad", "train", str(path), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return list(RunDirectory(run_dir).read("metrics.jsonl"))


def is_under_way(run_dir: Path, process: "subprocess.Popen[str]") -> bool:
    assert process.poll() is None, process.stderr and process.stderr.read()
    return num_steps(run_dir) >= 2


def num_steps(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
