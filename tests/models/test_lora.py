"""A LoRA student trains its adapter as the gradient of all weights says, leaves its base weights,
and is stored and resumed."""

import copy
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rlad
import rlad.training.run
from rlad.config.file import parse_config
from rlad.config.run import LoraConfig, RunConfig
from rlad.engines.native.loop import NativeEngine
from rlad.models.adapters import (
    add_frozen_adapter,
    add_lora,
    load_adapter,
    merged_weights,
    only_adapter,
    save_adapter,
)
from rlad.models.loading import LanguageModel, load_language_model
from rlad.models.student import load_reference, load_student
from rlad.rollouts.sampling import sample
from rlad.runs.directory import RunDirectory
from rlad.scoring.scorer import Scorer
from rlad.stopping import Stop, StopRequested
from rlad.tasks import make_task
from tiny_models import random_tokens, tiny_language_model, tiny_model
from tiny_runs import OFTEN_CORRECT, remains, rlad_fails, run_config, write_config

peft = pytest.importorskip("peft", reason="the optional package peft is not installed")
pytestmark = pytest.mark.peft

LORA = {"rank": 3, "alpha": 6.0}
PROMPTS, COMPLETIONS = random_tokens(3, 5, 4), random_tokens(6, 2, 4, seed=1)


def score(language_model: LanguageModel) -> torch.Tensor:
    return torch.cat(
        Scorer(language_model, temperature=0.7, tokens_per_batch=16).score(PROMPTS, COMPLETIONS)
    )


def sampled_tokens(language_model: LanguageModel) -> list[Any]:
    groups = sample(
        language_model, PROMPTS, group_size=2, max_completion_tokens=5, seed=0, temperature=1.0
    )
    return [completion.token_ids for group in groups for completion in group]


def randomise(model: Any, *, seed: int = 5, scale: float = 0.3) -> None:
    """Both factors of the trainable adapter away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def weights(model: Any, *, of_adapter: bool) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if ("lora_" in name) == of_adapter
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def config_of(world: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    student = {"device": "cpu", "lora": LORA} | sections.pop("student", {})
    return run_config(world, run_dir, student=student, **{"task": OFTEN_CORRECT} | sections)


# --- the adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_new_adapter_changes_nothing_and_is_alone_trainable(family):
    student = tiny_language_model(family)
    before, sampled = score(student), sampled_tokens(student)
    add_lora(student.model, LoraConfig(**LORA), base="base", seed=1)
    assert torch.equal(score(student), before)
    assert sampled_tokens(student) == sampled
    names = [
        name for name, parameter in student.model.named_parameters() if parameter.requires_grad
    ]
    assert (
        names
        and all("lora_" in name for name in names)
        and not any("lm_head" in name for name in names)
    )
    randomise(student.model)
    assert (score(student) - before).abs().max() > 0.1
    with only_adapter(student.model, None):
        assert torch.equal(score(student), before)


def test_a_is_drawn_from_the_runs_seed_alone():
    def drawn(
        seed: int, global_seed: int, dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        model: Any = tiny_model()
        model.to(dtype)
        torch.manual_seed(global_seed)
        add_lora(model, LoraConfig(**LORA), base="base", seed=seed)
        assert torch.initial_seed() == global_seed and torch.equal(
            torch.rand(1), _first_number(global_seed)
        )
        return weights(model, of_adapter=True)

    assert same(drawn(1, 0), drawn(1, 99)) and same(drawn(1, 0), drawn(1, 0, torch.bfloat16))
    assert not same(drawn(1, 0), drawn(2, 0))


def _first_number(seed: int) -> torch.Tensor:
    return torch.rand(1, generator=torch.Generator().manual_seed(seed))


def test_gradient_is_the_projection_of_that_of_all_weights():
    """With W' = W + s B A:  dL/dB = s (dL/dW') A^T  and  dL/dA = s B^T (dL/dW').

    W' is a plain model of its own.
    """
    student = tiny_language_model()
    add_lora(student.model, LoraConfig(**LORA), base="base", seed=1)
    randomise(student.model)
    scale, lora = LORA["alpha"] / LORA["rank"], dict(student.model.named_parameters())
    merged = tiny_language_model()
    for name, weight in merged.model.named_parameters():
        a, b = (lora.get(name.replace(".weight", f".lora_{x}.default.weight")) for x in "AB")
        if a is not None and b is not None:
            weight.data += scale * b.detach() @ a.detach()
    torch.testing.assert_close(score(student), score(merged), atol=1e-5, rtol=1e-5)
    weighting = torch.linspace(-1, 1, sum(map(len, COMPLETIONS)))
    for each in (student, merged):
        scores = Scorer(each, temperature=0.7, tokens_per_batch=100)(PROMPTS, COMPLETIONS)
        (scores.logprobs[scores.mask] * weighting).sum().backward()
    num_compared = 0
    for name, weight in merged.model.named_parameters():
        a, b = (lora.get(name.replace(".weight", f".lora_{x}.default.weight")) for x in "AB")
        if a is None or b is None:
            continue
        assert weight.grad is not None and weight.grad.abs().max() > 1e-3
        torch.testing.assert_close(b.grad, scale * weight.grad @ a.detach().T, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(a.grad, scale * b.detach().T @ weight.grad, atol=2e-5, rtol=1e-3)
        num_compared += 1
    assert num_compared == 2 * 7 and all(
        p.grad is None for name, p in lora.items() if "lora_" not in name
    )


def test_only_adapter_gives_everything_back_even_after_an_error():
    student = tiny_language_model()
    add_lora(student.model, LoraConfig(**LORA), base="base", seed=1)
    randomise(student.model)
    before, flags = score(student), [p.requires_grad for p in student.model.parameters()]
    with pytest.raises(RuntimeError, match="in the middle"), only_adapter(student.model, None):
        assert not any(p.requires_grad for p in student.model.parameters())
        raise RuntimeError("in the middle")
    assert (
        torch.equal(score(student), before)
        and [p.requires_grad for p in student.model.parameters()] == flags
    )
    assert sum(flags) == 28


def test_target_modules():
    model = tiny_model()
    add_lora(model, LoraConfig(target_modules=("q_proj", "v_proj")), base="base", seed=1)
    assert {n.split(".")[4] for n, p in model.named_parameters() if p.requires_grad} == {
        "q_proj",
        "v_proj",
    }
    with pytest.raises(
        ValueError,
        match=r"target_modules = \['c_attn'\] does not fit model 'base' \(.*name linear layers",
    ):
        add_lora(tiny_model(), LoraConfig(target_modules=("c_attn",)), base="base", seed=1)


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def adapter(world: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder with an adapter of the world's student, and its log-probs."""
    student = load_language_model(
        str(world / "student"), device="cpu", trainable=True, lora=LoraConfig(**LORA), seed=3
    )
    randomise(student.model)
    save_adapter(student.model, tmp_path / "adapter")
    return tmp_path / "adapter", short(student)


def short(language_model: LanguageModel) -> torch.Tensor:
    return torch.cat(
        Scorer(language_model, temperature=1.0, tokens_per_batch=99).score(
            [[2, 5, 3, 6]] * 2, [[3, 1], [4, 2, 1]]
        )
    )


def test_peft_itself_reads_what_is_written_and_we_what_peft_writes(adapter, world, tmp_path):
    folder, wanted = adapter
    base = load_language_model(str(world / "student"), device="cpu")
    assert (short(base) - wanted).abs().max() > 0.01
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder))
    ids = torch.tensor([[2, 5, 3, 6, 4, 2, 1]])
    logprobs = (
        theirs(input_ids=ids).logits.log_softmax(-1)[0, 3:6].gather(1, ids[0, 4:, None])[:, 0]
    )
    torch.testing.assert_close(logprobs, wanted[2:], atol=1e-6, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        short(load_language_model(str(tmp_path / "theirs"), device="cpu")), wanted, atol=0, rtol=0
    )
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(world / "student")
    assert (
        load_file(folder / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "theirs/adapter_model.safetensors").keys()
    )


def test_an_embedded_base_keeps_its_name(tmp_path):
    student = load_language_model(
        "embedded/student", device="cpu", trainable=True, lora=LoraConfig(rank=2), seed=3
    )
    randomise(student.model)
    save_adapter(student.model, tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter/adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        == "embedded/student"
    )
    again = load_language_model(str(tmp_path / "adapter"), device="cpu")
    assert torch.equal(short(again), short(student)) and len(again.tokenizer) == len(
        student.tokenizer
    )


def test_the_adapter_is_written_the_same_each_time(adapter, tmp_path):
    again = load_language_model(str(adapter[0]), device="cpu")
    save_adapter(again.model, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (adapter[0] / file).read_bytes(), file


def test_bfloat16_base_with_a_float32_adapter(adapter, world):
    folder, wanted = adapter
    student = load_language_model(str(folder), dtype="bfloat16", device="cpu", trainable=True)
    assert {p.dtype for n, p in student.model.named_parameters() if "lora_" not in n} == {
        torch.bfloat16
    }
    assert same(
        weights(student.model, of_adapter=True),
        weights(load_language_model(str(folder)).model, of_adapter=True),
    )
    assert 0 < (short(student) - wanted).abs().max() < 0.1


def spoil_base(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path="no/such-model")


def spoil_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "spoil, wanted",
    [
        (
            spoil_base,
            r"model 'no/such-model', of adapter '.*adapter', cannot be found",
        ),
        (spoil_weights, r"its adapter_model.safetensors cannot be read"),
        (drop_a_tensor, r"do not fit: 1 tensors differ, .* missing instead of \("),
        (
            lambda folder: edit_config(folder, base_model_name_or_path=None),
            r"names '' as its base model; base_model_name_or_path in its",
        ),
        (
            lambda folder: edit_config(folder, base_model_name_or_path=str(folder)),
            r"adapter' as its base model; .* must be a whole model",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            r"its adapter_config.json cannot be read",
        ),
    ],
)
def test_damaged_folders(adapter, spoil, wanted):
    spoil(adapter[0])
    with pytest.raises(ValueError, match=wanted):
        load_language_model(str(adapter[0]), device="cpu")


def test_a_run_does_not_start_from_an_adapter(adapter, world, tmp_path):
    config = parse_config(config_of(world, tmp_path / "run", student={"model": str(adapter[0])}))
    with pytest.raises(
        ValueError, match="is a LoRA adapter, but a run starts from a whole model; merge it"
    ):
        load_student(config)


# --- runs -----------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "rollout": {"prompts_per_batch": 4, "group_size": 3, "max_completion_tokens": 4},
    "optimization": {
        "num_steps": 4,
        "steps_per_rollout_batch": 2,
        "learning_rate": 3e-2,
        "schedule": "cosine",
        "weight_decay": 0.1,
        "kl_coef": 0.05,
        "tokens_per_batch": 24,
    },
}


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    config = config_of(world, tmp_path_factory.mktemp("lora") / "run", **EVERYTHING)
    return RunDirectory(rlad.train(config).run_dir)


def test_a_checkpoint_is_the_adapter_alone_and_base_weights_stay(finished, world):
    checkpoint = finished.checkpoints()[-1][1]
    assert {file.name for file in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert (checkpoint / "tokenizer.json").is_file()
    trained = load_language_model(str(checkpoint), device="cpu")
    base = {
        k.replace(".base_layer", ""): v for k, v in weights(trained.model, of_adapter=False).items()
    }
    assert same(
        base,
        dict(load_language_model(str(world / "student"), device="cpu").model.named_parameters()),
    )
    moved = [
        v.abs().max() for k, v in weights(trained.model, of_adapter=True).items() if "lora_B" in k
    ]
    assert min(moved) > 1e-4


class StopAt(Stop):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def check(self) -> None:
        self.at -= 1
        if self.at == 0:
            raise StopRequested(signal.SIGINT)


@pytest.mark.parametrize("at", [14, 25, 37])
def test_resume_is_exact(finished, world, tmp_path, monkeypatch, at):
    config = config_of(world, tmp_path / "run", **EVERYTHING)
    with monkeypatch.context() as patch, pytest.raises(StopRequested):
        patch.setattr(rlad.training.run, "Stop", lambda: StopAt(at))
        rlad.train(config)
    torch.manual_seed(at)
    rlad.train(config, resume=True)
    found, wanted = remains(tmp_path / "run"), remains(finished.path)
    assert (
        found.keys() == wanted.keys()
        and [k for k in wanted if k != "README.md" and found[k] != wanted[k]] == []
    )


def make_native(config: RunConfig, **kwargs: Any) -> NativeEngine:
    student = load_student(config)
    reference = load_reference(config, student)
    return NativeEngine(
        config,
        student=student,
        task=make_task(**config.task.model_dump()),
        reference=reference,
        **kwargs,
    )


def test_the_reference_is_the_base_model_without_a_copy(world, tmp_path):
    config = parse_config(
        config_of(
            world, tmp_path / "run", objective={"type": "grpo"}, optimization={"kl_coef": 0.5}
        )
    )
    engine = make_native(config)
    randomise(engine.student.model)
    batch = engine.make_rollout_batch(0)
    base = load_language_model(str(world / "student"), device="cpu")
    wanted = Scorer(base, temperature=1.0, tokens_per_batch=10_000).score(
        batch.prompts, batch.completions
    )
    assert batch.reference_logprobs is not None
    torch.testing.assert_close(
        torch.cat(batch.reference_logprobs), torch.cat(wanted), atol=1e-6, rtol=0
    )
    drift = torch.cat(engine.scorer.score(batch.prompts, batch.completions)) - torch.cat(wanted)
    assert drift.abs().max() > 0.01
    assert load_reference(config, engine.student) is engine.student


def test_optimiser_holds_the_adapter_alone(world, tmp_path):
    engine = make_native(
        parse_config(config_of(world, tmp_path / "run", objective={"type": "grpo"}))
    )
    before = weights(engine.student.model, of_adapter=False)
    next(engine.steps())
    assert sum(len(group["params"]) for group in engine.optimizer.param_groups) == 28
    assert len(engine.optimizer.state_dict()["state"]) == 28
    assert same(before, weights(engine.student.model, of_adapter=False))
    assert all(
        p.grad is None for n, p in engine.student.model.named_parameters() if "lora_" not in n
    )


@pytest.mark.parametrize("student", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_checkpointing_and_bfloat16(world, tmp_path, student):
    losses = []
    for changes in (student, {}):
        config = config_of(
            world,
            tmp_path / f"run{len(losses)}",
            student=changes,
            optimization={"learning_rate": 3e-2},
        )
        rows = list(RunDirectory(rlad.train(config).run_dir).read("metrics.jsonl"))
        losses.append([row["optimization/gradient_norm"] for row in rows])
    tolerance = 1e-5 if "gradient_checkpointing" in student else 0.5
    assert losses[0][0] == pytest.approx(losses[1][0], rel=tolerance) and max(losses[0]) > 0.05
    if "gradient_checkpointing" in student:
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_from_the_command_line(world, tmp_path):
    toml = write_config(tmp_path / "run.toml", config_of(world, tmp_path / "run"))
    wrong = rlad_fails("check", toml, "student.lora.rnk=4")
    assert "rnk" in wrong and "rank" in wrong
    parsed = parse_config(config_of(world, tmp_path / "run", student={"lora": {}}))
    assert parsed.student.lora == LoraConfig(rank=16, alpha=32.0, target_modules="all-linear")


def test_two_adapters_do_not_touch_each_other(adapter):
    folder, wanted = adapter
    student = load_language_model(str(folder), device="cpu")
    before = weights(student.model, of_adapter=True)
    load_adapter(student.model, str(folder), "second")
    after = weights(student.model, of_adapter=True)
    assert all(torch.equal(before[name], after[name]) for name in before) and len(after) == 2 * len(
        before
    )
    with only_adapter(student.model, "default"):
        assert torch.equal(short(student), wanted)


@pytest.mark.parametrize("targets", [("q_proj",), ("embed_tokens", "down_proj")])
def test_the_weights_for_another_sampler_are_those_of_the_student(tmp_path, targets) -> None:
    """Loaded into a plain model they give its logits, also with a teacher's adapter beside."""
    student = tiny_language_model()
    add_lora(student.model, LoraConfig(rank=4, target_modules=targets), base="tiny", seed=0)
    teacher = tiny_language_model()
    add_lora(teacher.model, LoraConfig(rank=4), base="tiny", seed=1)
    for model in (student.model, teacher.model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_adapter(teacher.model, tmp_path)
    add_frozen_adapter(student.model, str(tmp_path))
    plain = tiny_language_model(seed=1).model
    loaded = plain.load_state_dict(dict(merged_weights(student.model)), strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(
            plain(ids).logits, student.model(ids).logits, atol=1e-4, rtol=1e-4
        )
