"""What a model's tower makes: only what is needed is kept, and a model that reads features
otherwise than pixels is refused."""

import json
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

import tiny_vision
from rlad.config.run import RolloutConfig
from rlad.errors import RunFailedError, UserError
from rlad.models.grid_processor import GridProcessor
from rlad.models.loading import LanguageModel, save_model
from rlad.models.sent_pictures import require_same_ids, with_pictures
from rlad.models.vision import Vision
from rlad.models.without_weights import load_tokenizer
from rlad.rollouts.prompts import prompt_token_ids
from rlad.scoring.scorer import Scorer
from tiny_vision import EOS, FAMILIES, PAD, picture, tiny_processor, tiny_seeing_model


def score(model: LanguageModel, *seeds: int) -> list[torch.Tensor]:
    vision = model.vision
    assert vision is not None
    prompts = [
        vision.prompt(f"w12 {vision.wrapped_token} w14", [picture(seed)], add_special_tokens=True)
        for seed in seeds
    ]
    scorer = Scorer(model, temperature=1.0, tokens_per_batch=1_000)
    return scorer.score(prompts, [[20, 21]] * len(prompts))


def total_bytes(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(map(total_bytes, values)) if isinstance(values, list | tuple) else 0


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_kept_is_counted(family):
    model = tiny_seeing_model(family)
    score(model, 0)
    assert model.vision is not None
    (sight,) = model.vision._kept.values()
    assert total_bytes(list(sight.outputs.values())) == sight.num_bytes > 0


def other_model(config: Any, kind: Any) -> LanguageModel:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    tokenizer = tiny_vision.seeing_tokenizer()
    vision = Vision("other", "", tokenizer, config)
    vision.processor = tiny_processor("llava", tokenizer)
    return LanguageModel("other", model, tokenizer, (EOS,), PAD, torch.float32, vision)


def test_a_model_whose_pictures_see_both_ways_is_refused():
    """Without the kinds of tokens, Gemma 3 would read its pictures causally."""
    text = {**tiny_vision._TEXT, "sliding_window": 64, "query_pre_attn_scalar": 8}
    kind: Any = Gemma3Config
    config = kind(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=tiny_vision._EYES,
        mm_tokens_per_image=16,
        image_token_id=2,
        image_token_index=2,
    )
    with pytest.raises(UserError, match="Gemma3Model of 'other' does not read features"):
        score(other_model(config, Gemma3ForConditionalGeneration), 0)


def test_features_in_one_tensor_are_joined_too():
    kind: Any = VipLlavaConfig
    config = kind(
        text_config={"model_type": "qwen3", **tiny_vision._TEXT},
        vision_config={"model_type": "clip_vision_model", **tiny_vision._EYES},
        vision_feature_layers=[-1, -2],
        image_token_id=2,
        image_token_index=2,
    )
    model = other_model(config, VipLlavaForConditionalGeneration)
    (alone,) = score(model, 1)
    _, together, _ = score(model, 0, 1, 2)
    torch.testing.assert_close(together, alone)


def test_texts_alone_need_no_processor_of_pictures():
    model = tiny_seeing_model("llava")
    assert model.vision is not None
    vision = Vision(model.name, "/nowhere", model.tokenizer, model.model.config)
    rollout = RolloutConfig()
    expected = prompt_token_ids(model.tokenizer, "w20 w21", rollout, vision=model.vision)
    assert prompt_token_ids(model.tokenizer, "w20 w21", rollout, vision=vision) == expected
    with pytest.raises(UserError, match="no processor of pictures"):
        prompt_token_ids(model.tokenizer, "w20 w21", rollout, [picture(0)], vision)


def test_a_chat_template_of_the_processor_is_the_tokenizers(tmp_path):
    model = tiny_seeing_model("llava")
    save_model(model, tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert load_tokenizer(str(tmp_path)).chat_template == "of the processor"
    (tmp_path / "chat_template.jinja").write_text("of the tokenizer")
    assert load_tokenizer(str(tmp_path)).chat_template == "of the tokenizer"


def test_a_processor_of_grids_is_saved_from_a_folder_and_without_one(tmp_path):
    made = tiny_processor("qwen2_vl")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    made.save_pretrained(first)
    loaded = GridProcessor.from_pretrained(str(first), made.tokenizer, made.image_token)
    loaded.save_pretrained(second)
    again = GridProcessor.from_pretrained(str(second), made.tokenizer, made.image_token)
    image = picture(0, (48, 32)).image()
    text = {"text": [made.image_token], "images": [[image]], "return_tensors": "pt"}
    assert torch.equal(again(**text)["pixel_values"], made(**text)["pixel_values"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_is_sent_one_placeholder_for_each_picture(family):
    """It makes of each what the processor makes of that picture alone, which is put back here."""
    vision: Any = tiny_seeing_model(family).vision
    here = vision.wrapped_token
    pictures = [picture(1), picture(2, (48, 32))]
    prompt = vision.prompt(f"w20 {here} w21 {here}", pictures, add_special_tokens=False)
    sent = with_pictures(prompt, [30, 31], vision)
    token = vision.placeholder_ids[0]
    assert sent["token_ids"].count(token) == 2
    whole: list[int] = []
    waiting = list(pictures)
    for one in sent["token_ids"]:
        whole += vision.ids_of(waiting.pop(0)) if one == token else [one]
    assert whole == [*prompt, 30, 31]
    require_same_ids({"prompt_token_ids": whole}, whole, "http://127.0.0.1")
    with pytest.raises(RunFailedError, match=r"read 2 tokens of a prompt with pictures"):
        require_same_ids({"prompt_token_ids": [1, 2]}, whole, "http://127.0.0.1")
