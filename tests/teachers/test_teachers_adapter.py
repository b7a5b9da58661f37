"""The `adapter` teacher: the numbers of a separately loaded base model with its adapter, out of the
student's own memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import rlad
from rlad.cli.sample import preview
from rlad.config.file import parse_config
from rlad.config.run import LoraConfig, RunConfig
from rlad.engines.native.loop import NativeEngine
from rlad.errors import UserError
from rlad.models.adapters import save_adapter
from rlad.models.loading import LanguageModel, load_language_model
from rlad.models.student import load_student
from rlad.models.without_weights import load_tokenizer
from rlad.runs.directory import RunDirectory
from rlad.tasks import make_task
from rlad.teachers import check_teacher, prepare_teacher
from rlad.teachers.adapter import AdapterTeacher
from rlad.teachers.base import Setting, TeacherRequest
from rlad.teachers.local import LocalTeacher
from tiny_runs import WORDS, run_config, write_model, write_tokenizer

peft = pytest.importorskip("peft", reason="the optional package peft is not installed")
pytestmark = pytest.mark.peft

REQUESTS = [
    TeacherRequest((2, 5, 3, 6), (3, 1)),
    TeacherRequest((4, 5, 4, 6), (4, 2, 1)),
    TeacherRequest((2, 6), (1,)),
]


def write_adapter(folder: Path, base: Path, *, seed: int, **lora: Any) -> Path:
    """An adapter of `base` that does something."""
    settings = LoraConfig(**{"rank": 2, "alpha": 4.0, **lora})
    model = load_language_model(str(base), device="cpu", trainable=True, lora=settings)
    randomise(model, seed=seed)
    save_adapter(model.model, folder)
    return folder


def randomise(language_model: LanguageModel, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in language_model.model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5


@pytest.fixture
def folder(world: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", world / "student", seed=7)


def config_of(
    world: Path, run_dir: Path, teacher: dict[str, Any], **sections: Any
) -> dict[str, Any]:
    student = {"device": "cpu", "lora": {"rank": 3, "alpha": 6.0}}
    config = run_config(world, run_dir, **{"student": student, **sections})
    return config | {"teacher": teacher}


def prepared(config: dict[str, Any]) -> tuple[RunConfig, LanguageModel, AdapterTeacher]:
    parsed = parse_config(config)
    student = load_student(parsed)
    teacher = prepare_teacher(parsed, student)
    assert isinstance(teacher, AdapterTeacher)
    return parsed, student, teacher


def local_scores(name: str) -> list[torch.Tensor]:
    model = load_language_model(name, device="cpu")
    return LocalTeacher(model, temperature=1.0, tokens_per_batch=1000).logprobs(REQUESTS)


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return float((torch.cat(one) - torch.cat(other)).abs().max())


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_folder", [True, False])
def test_log_probs_are_those_of_a_separate_model(world, tmp_path, folder, with_folder):
    name = str(folder) if with_folder else "none"
    _, student, teacher = prepared(
        config_of(world, tmp_path / "run", {"type": "adapter", "adapter": name})
    )
    randomise(student, seed=1)
    wanted = local_scores(name if with_folder else str(world / "student"))
    assert largest_difference(teacher.logprobs(REQUESTS), wanted) < 1e-6
    assert (
        largest_difference(wanted, local_scores(str(world / "student"))) > 0.01 or not with_folder
    )
    if with_folder:
        theirs = peft.PeftModel.from_pretrained(
            load_language_model(str(world / "student"), device="cpu").model, name
        )
        logits = theirs(input_ids=torch.tensor([[2, 5, 3, 6, 3, 1]])).logits.log_softmax(-1)[0]
        assert largest_difference(teacher.logprobs(REQUESTS[:1]), [logits[[3, 4], [3, 1]]]) < 1e-6


def test_scoring_leaves_the_student_active_and_alone_trainable(
    world, tmp_path, folder, monkeypatch
):
    _, student, teacher = prepared(
        config_of(world, tmp_path / "run", {"type": "adapter", "adapter": str(folder)})
    )
    randomise(student, seed=1)

    def state() -> tuple[Any, ...]:
        flags = {name: p.requires_grad for name, p in student.model.named_parameters()}
        return flags, student.model.active_adapters(), student.model.training  # type: ignore[operator]

    before = state()
    assert {name.split(".")[-2] for name, flag in before[0].items() if flag} == {
        "default"
    } and before[1] == ["default"]
    ids = torch.tensor([[2, 5, 3, 6]])
    logits = student.model(input_ids=ids).logits
    teacher.logprobs(REQUESTS)
    assert state() == before and torch.equal(student.model(input_ids=ids).logits, logits)
    with pytest.raises(UserError, match="a prompt has no tokens"):
        teacher.logprobs([TeacherRequest((), (3,))])
    assert state() == before and torch.equal(student.model(input_ids=ids).logits, logits)


def test_one_set_of_base_weights_in_memory(world, tmp_path, folder):
    _, student, _ = prepared(
        config_of(world, tmp_path / "run", {"type": "adapter", "adapter": str(folder)})
    )
    tensors = [*student.model.parameters()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    base = sum(
        4 * p.numel()
        for p in load_language_model(str(world / "student"), device="cpu").model.parameters()
    )
    # Rank r costs r (in + out) for each linear layer: in each of 2 layers q, k, v, o, gate, up and
    # down.
    sizes = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 32), (16, 32), (32, 16)]
    each_rank = 2 * 4 * sum(map(sum, sizes))
    assert sum(storages.values()) == base + (3 + 2) * each_rank


# --- training -------------------------------------------------------------------------------------


def metrics_of(config: dict[str, Any]) -> list[dict[str, float]]:
    rows = RunDirectory(rlad.train(config).run_dir).read("metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows
    ]


def test_training_is_that_with_a_separate_teacher(world, tmp_path, folder):
    loop = {"learning_rate": 3e-2, "kl_coef": 0.05, "steps_per_rollout_batch": 2}
    shared = metrics_of(
        config_of(
            world,
            tmp_path / "shared",
            {"type": "adapter", "adapter": str(folder)},
            optimization=loop,
        )
    )
    separate = metrics_of(
        config_of(world, tmp_path / "separate", {"model": str(folder)}, optimization=loop)
    )
    base = metrics_of(config_of(world, tmp_path / "base", {"type": "adapter"}, optimization=loop))
    assert len(shared) == 4
    for one, other in zip(shared, separate, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert abs(shared[0]["teacher/log_ratio/mean"]) > 1e-3 and base[0][
        "teacher/log_ratio/mean"
    ] == pytest.approx(0, abs=1e-6)
    checkpoint = RunDirectory(tmp_path / "shared").checkpoints()[-1][1]
    assert not [
        key
        for key in (checkpoint / "adapter_config.json").read_text().split('"')
        if "frozen" in key
    ]


def test_the_teachers_adapter_decides_the_gradient_and_never_moves(world, tmp_path, folder):
    gradients = []
    for seed in (7, 8):
        other = write_adapter(tmp_path / f"adapter{seed}", world / "student", seed=seed)
        config = config_of(world, tmp_path / "run", {"type": "adapter", "adapter": str(other)})
        parsed, student, teacher = prepared(config | {"objective": {"type": "opd"}})
        engine = NativeEngine(
            parsed, student=student, task=make_task(**parsed.task.model_dump()), teacher=teacher
        )
        frozen = {
            n: p.detach().clone()
            for n, p in student.model.named_parameters()
            if ".default." not in n
        }
        scores = teacher.logprobs(REQUESTS)
        next(engine.steps())
        gradients.append(
            torch.cat([p.grad.flatten() for p in engine.parameters if p.grad is not None])
        )
        now = dict(student.model.named_parameters())
        assert all(torch.equal(frozen[name], now[name]) for name in frozen)
        assert any("frozen" in name for name in frozen)
        assert (
            len(engine.parameters) == 28
            and largest_difference(teacher.logprobs(REQUESTS), scores) == 0
        )
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_two_adapter_teachers_on_one_base(world, tmp_path, folder):
    second = write_adapter(tmp_path / "second", world / "student", seed=9, rank=1)
    settings = parse_config(config_of(world, tmp_path / "run", {"type": "adapter"}))
    student = load_student(settings)
    common = {"base": "base", "temperature": 1.0, "tokens_per_batch": 1000}
    teachers = [AdapterTeacher(student, folder=str(path), **common) for path in (folder, second)]
    for teacher, path in zip(teachers, (folder, second), strict=True):
        assert largest_difference(teacher.logprobs(REQUESTS), local_scores(str(path))) < 1e-6
    prints = [teacher.fingerprint for teacher in teachers]
    randomise(student, seed=3)
    assert [teacher.fingerprint for teacher in teachers] == prints and prints[0] != prints[1]


def test_preview_scores_with_the_base_model(world, tmp_path, folder):
    config = parse_config(
        config_of(world, tmp_path / "run", {"type": "adapter", "adapter": str(folder)})
    )
    (row, *_) = preview(config, num_prompts=1)
    model = load_language_model(str(folder), device="cpu")
    tokenizer = load_tokenizer(str(world / "student"))
    prompt: Any = tokenizer(row["prompt"])["input_ids"]
    completion: Any = tokenizer.convert_tokens_to_ids(row["tokens"])
    teacher = LocalTeacher(model, temperature=1.0, tokens_per_batch=1000)
    wanted = teacher.logprobs([TeacherRequest(prompt, completion)])[0].tolist()
    assert row["teacher_logprobs"] == pytest.approx(wanted, abs=1e-6)


# --- check ----------------------------------------------------------------------------------------


def errors(config: dict[str, Any]) -> list[str]:
    parsed = parse_config(config)
    findings = check_teacher(
        parsed.teacher, Setting(parsed, load_tokenizer(parsed.student.model), 256)
    )
    return [f"{finding.level}: {finding.message}" for finding in findings if finding.level != "ok"]


def edited(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_a_good_adapter_passes_the_check(world, tmp_path, folder):
    assert (
        errors(config_of(world, tmp_path / "run", {"type": "adapter", "adapter": str(folder)}))
        == []
    )
    assert errors(config_of(world, tmp_path / "run", {"type": "adapter"})) == []


def test_a_full_weight_student_is_refused(world, tmp_path):
    (message,) = errors(
        config_of(world, tmp_path / "run", {"type": "adapter"}, student={"device": "cpu"})
    )
    assert (
        message.startswith("error: it shares the student's base weights, which change unless")
        and "[student.lora]" in message
    )


def test_adapters_of_other_models_are_refused(world, tmp_path, folder):
    def messages(path: object) -> list[str]:
        return errors(config_of(world, tmp_path / "run", {"type": "adapter", "adapter": str(path)}))

    assert "is not the folder of an adapter" in messages(world / "student")[0]
    assert "is not the folder of an adapter" in messages(tmp_path / "nowhere")[0]
    wide = write_model(tmp_path / "wide", seed=3, intermediate_size=48)
    (message,) = messages(write_adapter(tmp_path / "other", wide, seed=1))
    assert "do not fit: 6 tensors differ" in message and "mlp.down_proj" in message
    moved = shutil.copytree(world / "student", tmp_path / "moved")
    (message,) = messages(write_adapter(tmp_path / "same", moved, seed=1))
    assert (
        message.startswith("warning") and "continue only if the two are the same model" in message
    )
    for changes, wanted in (
        ({"modules_to_save": ["lm_head"]}, "base model by modules_to_save"),
        ({"init_lora_weights": "pissa"}, "base model by init_lora_weights"),
        ({"peft_type": "IA3"}, "(peft_type = 'IA3') changes weights"),
    ):
        (message,) = messages(
            edited(shutil.copytree(folder, tmp_path / next(iter(changes)) / "adapter"), **changes)
        )
        assert wanted in message and "type = 'local'" in message
    words = (*WORDS[:2], *reversed(WORDS[2:]))
    write_tokenizer(folder, words)
    assert any("token ids differ" in message for message in messages(folder))
