"""The `local` teacher in 8 or 4 bits, on the CPU between uses, and under a name that tells them
apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import rlad
import rlad.teachers.local
from rlad.config.file import parse_config
from rlad.config.teacher import LocalTeacherConfig
from rlad.errors import UserError
from rlad.models.loading import LanguageModel, load_language_model
from rlad.models.student import load_student
from rlad.models.without_weights import load_tokenizer
from rlad.runs.directory import RunDirectory
from rlad.scoring.output_layer import OutputLayer, output_layer
from rlad.teachers import check_teacher, prepare_teacher
from rlad.teachers.base import Setting, TeacherRequest
from rlad.teachers.local import LocalTeacher, identity_of, quantization_config
from tiny_models import LargestTensor
from tiny_runs import OFTEN_CORRECT, run_config, write_model

REQUESTS = [
    TeacherRequest((2, 5, 3, 6), (3, 1)),
    TeacherRequest((4, 5, 4, 6), (4, 2, 1)),
    TeacherRequest((2, 6), (1,)),
]


def loaded(name: object, quantization: str = "none", dtype: str = "float32") -> LanguageModel:
    return load_language_model(
        str(name), dtype=dtype, device="cpu", quantization=quantization_config(quantization)
    )


def teacher_of(model: LanguageModel, **settings: Any) -> LocalTeacher:
    return LocalTeacher(model, temperature=1.0, tokens_per_batch=1000, **settings)


def round_to_8_bits(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric, a scale for each output channel: scale = max |w| / 127.5, w' = scale *
    clamp(round(w / scale), -128, 127)."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    return scale * (weight * (1 / scale)).round().clamp(-128, 127)


# --- quantised ------------------------------------------------------------------------------------

quantized = pytest.mark.quantization


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao", reason="the optional package torchao is not installed")


@quantized
@pytest.mark.parametrize("tied", [False, True])
def test_int8_is_the_model_with_its_linear_weights_rounded(torchao, tmp_path, tied):
    folder = write_model(tmp_path / "teacher", seed=2, tie_word_embeddings=tied)
    rounded, plain = loaded(folder), torch.cat(teacher_of(loaded(folder)).logprobs(REQUESTS))
    for name, parameter in rounded.model.named_parameters():
        if "_proj" in name:
            parameter.data = round_to_8_bits(parameter.data)
    found = torch.cat(teacher_of(loaded(folder, "int8")).logprobs(REQUESTS))
    torch.testing.assert_close(
        found, torch.cat(teacher_of(rounded).logprobs(REQUESTS)), atol=1e-5, rtol=0
    )
    assert 1e-4 < (found - plain).abs().max() < 0.1


@quantized
def test_int8_weighs_a_quarter_and_the_output_layer_stays(torchao, world):
    model = loaded(world / "teacher", "int8").model
    kinds = {name: type(parameter).__name__ for name, parameter in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "_proj" in name} == {"Int8Tensor"}
    assert {kind for name, kind in kinds.items() if "_proj" not in name} == {"Parameter"}
    weight: Any = model.get_submodule("model.layers.0.mlp.up_proj").weight
    parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    assert sorted(
        (part.dtype, part.numel()) for part in parts if part is not None and part.numel() == 32 * 16
    ) == [(torch.int8, 32 * 16)]
    assert sum(part.numel() for part in parts if part is not None) <= 32 * 16 + 2 * 32


@quantized
def test_int8_is_scored_in_tiles(torchao, tmp_path):
    folder = write_model(
        tmp_path / "teacher", seed=2, words=("<pad>", "<eos>", *(str(i) for i in range(3000)))
    )
    model = loaded(folder, "int8")
    head: Any = model.model.get_output_embeddings()
    assert output_layer(model.model) == OutputLayer(head)
    requests = [TeacherRequest([2, 3, 4], list(range(5, 15)))] * 200
    teacher = LocalTeacher(model, temperature=1.0, tokens_per_batch=10_000)
    with LargestTensor() as recorder:
        scores = teacher.logprobs(requests)
    assert torch.cat(scores).isfinite().all() and recorder.num_elements == 724 * 724 < 2000 * 3002


@quantized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_an_int8_teacher_is_resumed(torchao, world, tmp_path, dtype):
    teacher = {"quantization": "int8", "dtype": dtype, "device": "cpu"}
    how: dict[str, Any] = {"student": {"device": "cpu"}, "task": OFTEN_CORRECT}
    config = run_config(world, tmp_path / "run", teacher=teacher, **how)
    rlad.train(config)
    plain = rlad.train(run_config(world, tmp_path / "plain", **how))
    ratios = [
        next(RunDirectory(path).read("metrics.jsonl"))["teacher/log_ratio/mean"]
        for path in (tmp_path / "run", plain.run_dir)
    ]
    assert 0 < abs(ratios[0] - ratios[1]) < 0.1
    config["optimization"]["num_steps"] = 6
    rlad.train(config, resume=True)
    assert [row["step"] for row in RunDirectory(tmp_path / "run").read("metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@quantized
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_int4_on_a_gpu(torchao, world):
    plain = torch.cat(teacher_of(loaded(world / "teacher")).logprobs(REQUESTS))
    model = load_language_model(
        str(world / "teacher"),
        dtype="bfloat16",
        device="cuda",
        quantization=quantization_config("int4"),
    )
    found = torch.cat(teacher_of(model).logprobs(REQUESTS))
    assert found.isfinite().all() and 1e-4 < (found - plain).abs().mean() < 1


# --- on the CPU between uses ----------------------------------------------------------------------


def test_keep_cpu_moves_nothing_on_the_cpu(world):
    model = loaded(world / "teacher")
    before = [p.data_ptr() for p in model.model.parameters()]
    teacher = teacher_of(model, keep="cpu")
    wanted = teacher_of(loaded(world / "teacher")).logprobs(REQUESTS)
    assert torch.equal(torch.cat(teacher.logprobs(REQUESTS)), torch.cat(wanted))
    assert [p.data_ptr() for p in model.model.parameters()] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_keep_cpu_leaves_the_gpu_between_uses(world):
    model = load_language_model(str(world / "teacher"), device="cuda")
    teacher = teacher_of(model, keep="cpu")
    assert {p.device.type for p in model.model.parameters()} == {"cpu"}
    wanted = torch.cat(teacher_of(loaded(world / "teacher")).logprobs(REQUESTS))
    for _ in range(2):
        torch.testing.assert_close(torch.cat(teacher.logprobs(REQUESTS)), wanted, atol=1e-3, rtol=0)
        assert {t.device.type for t in (*model.model.parameters(), *model.model.buffers())} == {
            "cpu"
        }
    with pytest.raises(UserError, match="no tokens"):
        teacher.logprobs([TeacherRequest((), (3,))])
    assert {p.device.type for p in model.model.parameters()} == {"cpu"}


# --- names and mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({}, "m"),
        ({"dtype": "bfloat16"}, "m (bfloat16)"),
        ({"quantization": "int8"}, "m (int8)"),
        ({"dtype": "bfloat16", "quantization": "int4"}, "m (bfloat16, int4)"),
        ({"random_weights": True}, "m (random weights of seed 3)"),
        ({"keep": "cpu", "tokens_per_batch": 5}, "m"),
    ],
)
def test_identity_names_what_changes_the_numbers(settings, wanted):
    assert identity_of(LocalTeacherConfig(model="m", **settings), 3) == wanted


def test_identity_reaches_the_checkpoint(world, tmp_path):
    config = parse_config(
        run_config(world, tmp_path / "run", teacher={"dtype": "bfloat16", "device": "cpu"})
    )
    teacher = prepare_teacher(config, load_student(config))
    assert teacher is not None and teacher.identity == f"{world / 'teacher'} (bfloat16)"


@pytest.mark.parametrize(
    "settings, wanted",
    [
        (
            {"quantization": "int4"},
            "computes in bfloat16, and its packed weights must stay on the GPU; set dtype",
        ),
        ({"quantization": "int8", "random_weights": True}, "random_weights cannot be quantised"),
        (
            {"quantization": "int4", "dtype": "bfloat16", "keep": "cpu"},
            "and keep = 'gpu', or use int8",
        ),
        ({"quantization": "int2"}, "Input should be 'none', 'int8' or 'int4'"),
    ],
)
def test_settings_that_do_not_go_together(settings, wanted):
    with pytest.raises(ValidationError, match=wanted):
        LocalTeacherConfig(model="m", **settings)


def quantization_findings(world: Path, tmp_path: Path, **teacher: Any) -> list[str]:
    config = parse_config(
        run_config(world, tmp_path / "run", student={"device": "cpu"}, teacher=teacher)
    )
    findings = check_teacher(
        config.teacher, Setting(config, load_tokenizer(config.student.model), 256)
    )
    return [
        f"{finding.level}: {finding.message}"
        for finding in findings
        if finding.subject == "quantization"
    ]


def test_check_names_the_package_that_is_missing(world, tmp_path, monkeypatch):
    def find_spec(name: str) -> Any:
        return None if name == "torchao" else object()

    monkeypatch.setattr(rlad.teachers.local.importlib.util, "find_spec", find_spec)
    (message,) = quantization_findings(world, tmp_path, quantization="int8")
    assert message == (
        "error: teacher.quantization = 'int8' needs torchao and accelerate; install them with: pip "
        "install "
        "'rlad[quantization]'."
    )
    assert quantization_findings(world, tmp_path) == []


@quantized
def test_check_of_quantised_teachers(torchao, world, tmp_path):
    assert quantization_findings(world, tmp_path, quantization="int8") == [
        "ok: linear layers int8, the output layer float32"
    ]
    (message,) = quantization_findings(world, tmp_path, quantization="int4", dtype="bfloat16")
    assert message.startswith(
        "error: teacher.quantization = 'int4' has no kernel on the device 'cpu'; set it to 'int8'"
    )
