"""A picture processor for models that read flat patches with their grid (Qwen2-VL, Qwen3-VL).

Transformers' own processor needs torchvision for films; for pictures, Pillow is enough.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor
from transformers.utils.hub import cached_file

_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class GridProcessor:
    """A processor that expands each placeholder to a token per `merge_size` x `merge_size`
    patches."""

    def __init__(self, image_processor: Any, tokenizer: Any, image_token: str, where: Any = None):
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_token = image_token
        self.where = where
        """The folder or name whose files are copied on saving."""

    @classmethod
    def from_pretrained(cls, name: Any, tokenizer: Any, image_token: str) -> "GridProcessor":
        """Load a processor. Raises `ValueError` for an image processor with another layout."""
        images = AutoImageProcessor.from_pretrained(name)
        if "image_grid_thw" not in images.model_input_names:
            raise ValueError("its pixels have no grid")
        return cls(images, tokenizer, image_token, name)

    def __call__(
        self, *, text: list[str], images: list[list[Any]], return_tensors: str, **tokenize: Any
    ) -> dict[str, Any]:
        pixels = self.image_processor(images[0], return_tensors=return_tensors)
        sizes = pixels["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2
        parts = text[0].split(self.image_token)
        if len(parts) != len(sizes) + 1:
            raise ValueError(
                f"the text has {len(parts) - 1} placeholders for {len(sizes)} pictures"
            )
        expanded = parts[0]
        for part, size in zip(parts[1:], sizes.tolist(), strict=True):
            expanded += self.image_token * size + part
        return {**self.tokenizer([expanded], return_tensors="pt", **tokenize), **pixels}

    def save_pretrained(self, folder: Path) -> None:
        """Copy the files of transformers' own processor, including those for films. If there are
        none, write what pictures need."""
        found = [self._file(name) for name in _FILES] if self.where else []
        for source in filter(None, found):
            shutil.copy(source, folder)
        if not any(found):
            self.image_processor.save_pretrained(folder)

    def _file(self, name: str) -> str | None:
        return cached_file(
            self.where,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
