"""Pictures for a server: vLLM's route for token ids also takes pictures."""

import math
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from rlad.errors import RunFailedError, UserError
from rlad.findings import Finding
from rlad.models.pictures import Picture, PicturedPrompt
from rlad.models.sent_pictures import require_same_ids, with_pictures
from rlad.models.vision import Vision
from rlad.replicas import ServerRefusedError, ServerUnavailableError
from rlad.teachers.served.protocol import (
    Scoring,
    TokenScore,
    read_scores,
    read_token_ids,
    scoring_request,
)

PATH = "/inference/v1/generate"
NUM_WRITTEN = 5
"""Tokens that a server writes after a picture in the self-test."""
_SIZE = (96, 64)


def picture_request(
    scoring: Scoring,
    model: str,
    prompt: PicturedPrompt,
    completion: Sequence[int],
    vision: Vision,
) -> dict[str, Any]:
    """Make the request for the log-probs of the tokens after a prompt with pictures."""
    sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0}
    if scoring == "prompt_logprob_token_ids":
        tokens = [*prompt, *completion]
        sampling = scoring_request(scoring, model, tokens, start=len(prompt))["sampling_params"]
    return {"model": model, "sampling_params": sampling} | with_pictures(prompt, completion, vision)


def read_picture_scores(
    scoring: Scoring, answer: dict[str, Any], tokens: Sequence[int], *, start: int, url: str
) -> list[TokenScore]:
    """Read the scores of the tokens from `start` on. Raises `RunFailedError` if the server read
    other tokens."""
    require_same_ids(answer, tokens, url)
    if scoring != "prompt_logprob_token_ids":
        scoring = "prompt_logprobs"
        # On this route they are next to the choices.
        answer = {"choices": [{"prompt_logprobs": answer.get("prompt_logprobs")}]}
    return read_scores(scoring, answer, tokens, start=start)[start:]


def picture_findings(test: Any) -> list[Finding]:
    """Check whether a server reads a picture as the student's tokens, uses it, and scores tokens
    after it with the log-probs that it reported when it wrote them.

    `test` is a `SelfTest` that has found a way of scoring. A server that takes no pictures is only
    a warning, since the problems may have none.
    """
    try:
        vision: Vision | None = test.setting.vision
    except UserError:  # the student cannot be read, which is reported where it is loaded
        return []
    if vision is None or not vision.has_processor:
        return []
    try:
        return [_compared(test, vision)]
    except (ServerRefusedError, ServerUnavailableError) as error:
        said = getattr(error, "said", str(error)).rstrip(".")
        message = (
            f"it takes none ({said}), so it is for problems without any; serve a model that reads "
            "pictures with vLLM and --enable-scale-out."
        )
        return [Finding("warning", "pictures", message)]
    except (RunFailedError, UserError) as error:
        return [Finding("error", "pictures", str(error))]


def _compared(test: Any, vision: Vision) -> Finding:
    model = test.settings.model
    prompt = _probe(vision, test.text, _noise())
    sampling = {"temperature": 0.0, "max_tokens": NUM_WRITTEN, "logprobs": 0, "ignore_eos": True}
    body = {"model": model, "sampling_params": sampling} | with_pictures(prompt, (), vision)
    answer = test.client.ask(test.url, PATH, body)
    require_same_ids(answer, prompt, test.url)
    written = read_token_ids(answer)
    completion = [token for token, _ in written]
    if not completion:
        raise RunFailedError(f"{test.url} wrote nothing after a picture, or no log-probs of it.")

    def scores(shown: PicturedPrompt) -> list[float]:
        asked = picture_request(test.scoring, model, shown, completion, vision)
        answer = test.client.ask(test.url, PATH, asked)
        tokens = [*shown, *completion]
        found = read_picture_scores(test.scoring, answer, tokens, start=len(shown), url=test.url)
        return [score.logprob for score in found]

    seen = scores(prompt)
    finding: Finding = test.compare(
        "pictures",
        seen,
        [value for _, value in written],
        equal=f"a picture of {len(vision.ids_of(prompt.pictures[0]))} tokens is read in the "
        "student's tokens, and scores after it agree with writing",
        otherwise="what the server wrote after a picture has other log-probs when it scores it",
    )
    black = Picture.from_pil(Image.new("RGB", _SIZE), "black")
    if finding.level == "ok" and seen == scores(_probe(vision, test.text, black)):
        message = "it gives the same log-probs after another picture, so it does not look at it."
        return Finding("error", "pictures", message)
    return finding


def _probe(vision: Vision, text: Sequence[int], picture: Picture) -> PicturedPrompt:
    """Return a prompt with a picture and some of the probe's text."""
    begins = vision.prompt(vision.wrapped_token, [picture], add_special_tokens=True)
    never = vision.placeholder_ids
    return PicturedPrompt([*begins, *(one for one in text[:20] if one not in never)], [picture])


def _noise() -> Picture:
    draw = random.Random(0)
    pixels = bytes(draw.randrange(256) for _ in range(3 * math.prod(_SIZE)))
    return Picture.from_pil(Image.frombytes("RGB", _SIZE, pixels), "noise")
