"""An exported model answers as the checkpoint that it was made of, in transformers; a LoRA
student's adapter is merged."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from exported_runs import LENGTH, LORA, PROMPTS, answers, answers_of_export, checkpoint, write_run
from rlad.errors import RunFailedError
from rlad.export.model import export_model
from rlad.models.loading import load_language_model, save_model
from rlad.models.without_weights import unused_generation_settings
from rlad.rollouts.sampling import sample
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from tiny_runs import rlad_fails

full_or_lora = pytest.mark.parametrize(
    "lora", [None, pytest.param(LORA, marks=pytest.mark.peft)], ids=["full", "lora"]
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPTS[-1]])).logits.float()


@full_or_lora
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_answers_as_its_checkpoint_token_for_token(tmp_path, lora, tied):
    run = write_run(tmp_path, lora=lora, sizes={"tie_word_embeddings": tied})
    folder = export_model(str(run))
    assert folder == run.with_name("run-model")
    trained = load_language_model(str(checkpoint(run)), device="cpu")
    groups = sample(
        trained, PROMPTS, group_size=1, max_completion_tokens=LENGTH, seed=0, temperature=0.0
    )
    assert (
        answers_of_export(folder)
        == answers(trained.model)
        == [list(group[0].token_ids) for group in groups]
    )
    assert answers(trained.model) != answers_of_export(tmp_path / "student")
    exported: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (logits(exported) - logits(trained.model)).abs().max() < (1e-4 if lora else 1e-12)
    assert exported.dtype == torch.float32 and bool(exported.config.tie_word_embeddings) == tied
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(load_file(tmp_path / "student" / "model.safetensors"))
    files = {path.name for path in folder.iterdir()}
    assert files >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert not any("adapter" in name or "trainer" in name or "manifest" in name for name in files)


@full_or_lora
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_in_bfloat16(tmp_path, lora, tied):
    """Training's bfloat16 base weights are kept, and the adapter is added to them in float32; only
    `dtype` rounds the sum."""
    run = write_run(tmp_path, lora=lora, sizes={"tie_word_embeddings": tied}, dtype="bfloat16")
    exact, rounded = (
        export_model(str(run)),
        export_model(str(run), tmp_path / "rounded", dtype="bfloat16"),
    )
    base, trained = (
        load_file(tmp_path / "student" / "model.safetensors"),
        load_file(exact / "model.safetensors"),
    )
    if lora:
        adapter = load_file(checkpoint(run) / "adapter_model.safetensors")
        name = "model.layers.1.mlp.down_proj"
        a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        expected = base[f"{name}.weight"].bfloat16().float() + 6.0 / 3 * b @ a
        assert torch.allclose(trained[f"{name}.weight"], expected, atol=1e-6, rtol=0)
        assert (expected - base[f"{name}.weight"]).abs().max() > 0.1
    else:
        stored = load_file(checkpoint(run) / "model.safetensors")
        assert all(torch.equal(trained[name], stored[name]) for name in stored)
        student = load_language_model(str(checkpoint(run)), device="cpu", dtype="bfloat16")
        assert answers_of_export(rounded) == answers(student.model)
    written = load_file(rounded / "model.safetensors")
    assert written.keys() == trained.keys() and all(
        torch.equal(written[name], trained[name].bfloat16()) for name in trained
    )
    assert answers_of_export(exact, dtype=torch.bfloat16) == answers_of_export(rounded)


@pytest.mark.peft
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_of_which_one_has_an_adapter_become_two(tmp_path, target):
    run = write_run(
        tmp_path, lora=LORA | {"target_modules": [target]}, sizes={"tie_word_embeddings": True}
    )
    trained = load_language_model(str(checkpoint(run)), device="cpu")
    exported: Any = AutoModelForCausalLM.from_pretrained(export_model(str(run))).eval()
    assert (logits(exported) - logits(trained.model)).abs().max() < 1e-4
    assert not torch.equal(exported.lm_head.weight, exported.model.embed_tokens.weight)


def test_it_ends_where_rlad_ends_and_speaks_its_template(tmp_path):
    run = write_run(tmp_path, end_tokens=["<eos2>"])
    folder = export_model(str(run))
    settings = json.loads((folder / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == ([1, 2], 0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "w5 w9"}], tokenize=False)
    assert said == "w5 w9 " and len(tokenizer) == VOCABULARY


def student_with(folder: Path, settings: dict[str, Any], *, own_head: bool = False) -> Path:
    """A tiny student whose generation settings, and perhaps output layer, are its own."""
    tiny_model(seed=3, tie_word_embeddings=own_head).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if own_head:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_generation_settings_that_had_no_part_in_training_are_not_kept(tmp_path):
    settings = {"repetition_penalty": 1.5, "top_k": 3, "do_sample": True, "eos_token_id": [1, 2]}
    student = load_language_model(str(student_with(tmp_path / "student", settings)), trainable=True)
    save_model(student, tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [1, 2] and not {"repetition_penalty", "top_k"} & set(kept)
    assert unused_generation_settings(str(tmp_path / "student")) == [
        "do_sample = True",
        "repetition_penalty = 1.5",
        "top_k = 3",
    ]


def test_an_output_layer_of_its_own_is_not_called_tied(tmp_path):
    folder = student_with(tmp_path / "student", {}, own_head=True)
    student = load_language_model(str(folder), trainable=True)
    save_model(student, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not config["tie_word_embeddings"]
    assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    run = write_run(tmp_path)
    for folder in (checkpoint(run), export_model(str(run))):
        modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        assert modes == {folder.stat().st_mode & 0o666}


def test_the_checkpoint_that_is_asked_for(tmp_path):
    run = write_run(tmp_path, scores=(0.2, 0.7, 0.4))
    for which, step in {"best": 2, "last": 3, "1": 1}.items():
        folder = export_model(str(run), tmp_path / which, checkpoint=which)
        expected = load_file(checkpoint(run, step) / "model.safetensors")
        found = load_file(folder / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected), which


def test_bad_input(tmp_path):
    run = write_run(tmp_path)
    assert rlad_fails("export", "model", tmp_path) == (
        f"rlad: there is no run in {tmp_path}; give the directory of a run, as `rlad train` names "
        "it at its end."
    )
    assert "use best, last, or one of its steps: 1." in rlad_fails(
        "export", "model", run, "--checkpoint", "7"
    )
    (tmp_path / "there").mkdir()
    assert "exists already" in rlad_fails("export", "model", run, "--output", tmp_path / "there")
    assert "no parent folder" in rlad_fails(
        "export", "model", run, "--output", tmp_path / "no" / "place"
    )
    with (checkpoint(run) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused = rlad_fails("export", "model", run, "--checkpoint", "1")
    assert "--checkpoint 1" in refused and "model.safetensors" in refused
    shutil.rmtree(run / "checkpoints")
    assert "holds no checkpoint" in rlad_fails("export", "model", run)
    assert not (tmp_path / "run-model").exists()


@pytest.mark.peft
def test_an_adapter_whose_base_is_gone(tmp_path):
    run = write_run(tmp_path, lora=LORA)
    shutil.rmtree(tmp_path / "student")
    assert ", of adapter" in rlad_fails("export", "model", run)


def test_a_folder_that_cannot_be_written_is_absent(tmp_path):
    """The system refuses a file of more than 4 kB, as a full disk would."""
    run, limits = write_run(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(
            RunFailedError,
            match=r"run-model cannot be written \(.*; free some space .* give another --output\.",
        ):
            export_model(str(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "student"}
