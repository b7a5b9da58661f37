"""A vLLM server that is sent pictures: as the sampler of a student that sees, and as a teacher.

Needs an environment with vLLM and rlad (`.ci/vllm-environment`), whose Python `RLAD_VLLM_PYTHON`
names.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from rlad.config.file import parse_config
from rlad.models.language_part import language_parameters
from rlad.models.loading import LanguageModel, save_model
from rlad.scoring.scorer import Scorer
from rlad.teachers import check_teacher, make_teacher
from rlad.teachers.base import Setting, TeacherRequest
from running_servers import free_port
from tiny_vision import picture, tiny_seeing_model
from vllm_servers import FLAGS, TEMPERATURE, VLLM_PYTHON, sampler_at, vllm_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not VLLM_PYTHON,
        reason="set RLAD_VLLM_PYTHON to what `.ci/vllm-environment DIRECTORY` prints",
    ),
]


def prompts_of(model: LanguageModel) -> list[Any]:
    """With one, two and no pictures."""
    vision: Any = model.vision
    two = [picture(1), picture(2, (48, 32))]
    return [
        vision.prompt("<image> w20 w21", [picture(0)], add_special_tokens=False),
        vision.prompt("<image> w22 <image>", two, add_special_tokens=False),
        tuple(model.tokenizer("w23 w24", add_special_tokens=False)["input_ids"]),
    ]


def distances(scores: list[list[float]], others: list[list[float]]) -> list[float]:
    rows = zip(scores, others, strict=True)
    return [abs(a - b) for row, other in rows for a, b in zip(row, other, strict=True)]


def test_a_server_sees_pictures_as_the_trainer_does(tmp_path: Path) -> None:
    model = tiny_seeing_model("idefics3", head_dim=32)
    save_model(model, tmp_path / "student")
    port = free_port()
    with vllm_server(tmp_path / "student", port, *FLAGS):
        with closing(sampler_at(port, model, max_prompt_tokens=64)) as sampler:
            move_language_part(model)
            sampler.weights_changed()
            groups = sampler.sample(
                prompts_of(model),
                group_size=8,
                max_completion_tokens=24,
                temperature=TEMPERATURE,
                seed=1,
            )
        requests = [
            TeacherRequest(prompt, one.token_ids)
            for prompt, group in zip(prompts_of(model), groups, strict=True)
            for one in group
        ]
        given = [list(one.logprobs) for group in groups for one in group]
        found = distances(scores_of(model, requests, TEMPERATURE), given)
        assert len(found) > 300 and max(found) < 1e-3
        never = set(model.never_written)
        assert not any(never & set(one.completion) for one in requests)
        # It keeps the weights, so it is a teacher whose log-probs are known.
        of_teacher = scores_of_teacher(model, tmp_path / "student", port, requests)
        assert max(distances(scores_of(model, requests, 1.0), of_teacher)) < 1e-3


def move_language_part(model: LanguageModel) -> None:
    """The tower stays as it is, which is what a server keeps."""
    kept = language_parameters(model.model)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if id(parameter) in kept:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def scores_of(
    model: LanguageModel, requests: list[TeacherRequest], temperature: float
) -> list[list[float]]:
    scorer = Scorer(model, temperature=temperature, tokens_per_batch=4096)
    prompts = [one.prompt for one in requests]
    return [row.tolist() for row in scorer.score(prompts, [one.completion for one in requests])]


def scores_of_teacher(
    model: LanguageModel, folder: Path, port: int, requests: list[TeacherRequest]
) -> list[list[float]]:
    config = parse_config(
        {
            "student": {"model": str(folder), "device": "cpu"},
            "task": {"type": "scenes"},
            "objective": {"type": "opd"},
            "rollout": {"max_prompt_tokens": 64, "max_completion_tokens": 24},
            "teacher": {
                "type": "served",
                "urls": [f"http://127.0.0.1:{port}/v1"],
                "model": str(folder),
                "tolerance": 1e-3,
            },
        }
    )
    setting = Setting(config, model.tokenizer, 512, model)
    findings = {one.subject: one for one in check_teacher(config.teacher, setting)}
    assert findings["pictures"].level == "ok", findings["pictures"].message
    assert "read in the student's tokens" in findings["pictures"].message
    with closing(make_teacher(config.teacher, setting)) as teacher:
        return [row.tolist() for row in teacher.logprobs(requests)]
