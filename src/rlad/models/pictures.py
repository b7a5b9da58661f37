"""Pictures of problems: opened when needed, limited in size, identified by their bytes."""

import base64
import binascii
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Self

from PIL import Image, ImageOps, UnidentifiedImageError

from rlad.errors import UserError

MARKER = "<image>"
"""Marks the position of a picture in a problem's text, whatever a model's own placeholder is."""
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 2**20
"""Most pixels of one picture; a small file may unpack to gigabytes."""


@dataclass(frozen=True)
class Picture:
    """A picture, by the bytes of its file. Two with the same bytes are equal."""

    data: bytes
    name: str = ""
    """its name in messages"""
    blackened: tuple[int, int] | None = None
    """edge in pixels of the squares that are each black with probability 1/2, and the seed"""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """A hash of the picture's content."""
        return hashlib.sha256(self.data + repr(self.blackened).encode()).hexdigest()[:32]

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a picture's file. Raises `UserError` if there is none, or it is not a picture."""
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise UserError(
                    f"picture {str(path)!r} has {size} bytes, and at most {MAX_BYTES} are allowed; "
                    "make it smaller."
                )
            picture = cls(path.read_bytes(), str(path))
        except (OSError, ValueError) as error:  # ValueError: no path at all
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"picture {str(path)[:200]!r} cannot be read ({reason}); give the path of an "
                "image file, relative to the file that names it."
            ) from None
        picture.require_sound()
        return picture

    @classmethod
    def from_base64(cls, text: str, name: str) -> Self:
        """Decode a picture, with or without `data:image/...;base64,`. Raises `UserError` for other
        text."""
        try:
            # The text may have line breaks.
            data = base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
        except (binascii.Error, ValueError):
            raise UserError(
                f"{name} is neither the path of a file nor base64; give one of the two."
            ) from None
        picture = cls(data, name)
        picture.require_sound()
        return picture

    @classmethod
    def from_pil(cls, image: Any, name: str) -> Self:
        """Store an image of Pillow as a PNG."""
        buffer = BytesIO()
        ImageOps.exif_transpose(image).convert("RGB").save(buffer, format="PNG")
        return cls(buffer.getvalue(), name)

    def require_sound(self) -> None:
        """Raise `UserError` unless it can be opened and is not too large. Pixels are not
        unpacked."""
        self._opened()

    def _opened(self) -> Any:
        try:
            image = Image.open(BytesIO(self.data))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(
                f"picture {self.name!r} cannot be opened ({reason}); give a PNG, JPEG, WebP, GIF "
                "or BMP."
            ) from None
        except Image.DecompressionBombError:
            raise UserError(self._too_large("more than Pillow opens")) from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(self._too_large(f"{width} x {height}"))
        return image

    def _too_large(self, pixels: str) -> str:
        return (
            f"picture {self.name!r} has {pixels} pixels, and at most {MAX_PIXELS} in all are "
            "allowed; make it smaller."
        )

    def image(self) -> Any:
        """Unpack it as a Pillow image in RGB, with the orientation in its file applied.

        Raises `UserError` if the file is damaged.
        """
        opened = self._opened()
        try:
            # Cameras store the orientation separately from the pixels.
            image = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(
                f"picture {self.name!r} is damaged ({error}); give a whole file."
            ) from None
        return _with_black_squares(image, *self.blackened) if self.blackened else image

    def data_url(self, edge: int = 256) -> str:
        """Return it for a web page, at most `edge` pixels wide and high."""
        image = self.image()
        image.thumbnail((edge, edge))
        return _png_url(image)

    def whole_url(self) -> str:
        """Return it for another program, with all its pixels."""
        return _png_url(self.image())

    def corrupted(self, *, edge: int, seed: int) -> Self:
        """Return it with each square of `edge` pixels black with probability 1/2.

        Its size does not change, so a model sees it in the same grid.
        """
        return replace(self, blackened=(edge, seed))


def _with_black_squares(image: Any, edge: int, seed: int) -> Any:
    draw = random.Random(seed)
    width, height = image.size
    image = image.copy()
    for top in range(0, height, edge):
        for left in range(0, width, edge):
            if draw.random() < 0.5:
                image.paste((0, 0, 0), (left, top, left + edge, top + edge))
    return image


class PicturedPrompt(tuple[int, ...]):
    """The token ids of a prompt with the pictures that its placeholders stand for.

    It can be used wherever a prompt is. Each model processes the pictures with its own processor.
    Two are equal if their tokens and pictures are.
    """

    pictures: tuple[Picture, ...]

    def __new__(cls, token_ids: Sequence[int], pictures: Sequence[Picture]) -> Self:
        prompt = super().__new__(cls, token_ids)
        prompt.pictures = tuple(pictures)
        return prompt

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, PicturedPrompt) and self.pictures == other.pictures
        return same and super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.pictures))

    def __reduce__(self) -> Any:
        return type(self), (tuple(self), self.pictures)


def _png_url(image: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_pictures(token_ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, ...]:
    """Return a stored prompt with the pictures of its problem."""
    return PicturedPrompt(token_ids, pictures) if pictures else tuple(token_ids)


def without_markers(text: str) -> str:
    """Remove the markers of pictures from a text that has no pictures."""
    # Removing one may create another.
    while MARKER in text:
        text = text.replace(MARKER, "")
    return text


def held(prompt: Sequence[int]) -> tuple[int, ...]:
    """Return a prompt as a tuple, with its pictures if it has any."""
    return prompt if isinstance(prompt, PicturedPrompt) else tuple(prompt)


def pictures_of(prompt: Sequence[int]) -> tuple[Picture, ...]:
    """Return the pictures of a prompt; empty for plain token ids."""
    return prompt.pictures if isinstance(prompt, PicturedPrompt) else ()


def require_blind_prompts(prompts: Sequence[Sequence[int]], name: str) -> None:
    """Raise `UserError` for a prompt with pictures, since the model `name` reads only text."""
    if any(map(pictures_of, prompts)):
        raise UserError(
            f"a prompt has pictures, but model {name!r} reads only text; use a vision model, or "
            "problems without pictures."
        )
