"""The pictures in a row of the user's data, and messages with several parts."""

import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlad.errors import UserError
from rlad.models.pictures import MARKER, Picture

MAX_PICTURES = 16
"""most pictures of one problem"""
_KINDS = {"image": "pictures", "audio": "sound", "video": "films"}
"""names of media, by the first part of a MIME type"""


def with_text_parts(row: Any, field: str) -> Any:
    """Return a row whose messages are texts. Content with several parts becomes a text with
    markers."""
    messages = row.get(field) if isinstance(row, dict) else None
    if not isinstance(messages, list):
        return row
    return {**row, field: [_with_text(message) for message in messages]}


def _with_text(message: Any) -> Any:
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return message
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image", **rest} if not any(rest.values()):
                texts.append(MARKER)
            case _:
                return message  # it is refused later
    return {**message, "content": "".join(texts)}


def pictures_of_row(
    row: dict[str, Any], field: str, *, source: str, where: str
) -> tuple[Picture, ...]:
    """Read the pictures of a row: paths relative to the file, base64, or images of `datasets`.

    Raises `UserError` for a picture that is missing, unreadable or too large, and for too many
    pictures.
    """
    given = row.get(field)
    if given is None or given == []:
        _require_no_other_column(row, field, where)
        return ()
    several: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
    if len(several) > MAX_PICTURES:
        raise UserError(
            f"{where}: the field {field!r} has {len(several)} pictures, but at most {MAX_PICTURES} "
            "are allowed; remove some."
        )
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    try:
        return tuple(
            _picture(one, folder, f"{where}, {field} {n}") for n, one in enumerate(several, start=1)
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _require_no_other_column(row: dict[str, Any], field: str, where: str) -> None:
    """Raise `UserError` if a row has pictures, sound or films in another field. The question would
    be asked without them."""
    for name, value in row.items():
        kind = _kind(value[0] if isinstance(value, list) and value else value)
        if name == field or kind is None:
            continue
        if kind == "pictures":
            raise UserError(
                f"{where}: the field {name!r} holds pictures, but {field!r} none; name it with "
                "images_field, or remove it."
            )
        raise UserError(
            f"{where}: the field {name!r} holds {kind}, but a student can be shown only pictures; "
            "remove it."
        )


def _kind(value: Any) -> str | None:
    """Name the kind of media in a value; None if there is none."""
    if hasattr(value, "convert"):
        return "pictures"
    if isinstance(value, str):
        found = value.removeprefix("data:").partition("/")[0]
        return _KINDS.get(found) if value.startswith("data:") else None
    if not isinstance(value, dict) or not isinstance(value.get("bytes"), bytes):
        return None
    try:
        Picture(value["bytes"]).require_sound()
    except UserError:
        found = (mimetypes.guess_type(str(value.get("path")))[0] or "").partition("/")[0]
        return _KINDS.get(found, "binary data")
    return "pictures"


def require_markers(prompt: str, num_pictures: int, where: str) -> None:
    """Raise `UserError` unless a prompt has a marker for each of its pictures, or none at all."""
    number = prompt.count(MARKER)
    if num_pictures and number not in (0, num_pictures):
        raise UserError(
            f"{where}: the prompt has {number} times {MARKER!r} and the row {num_pictures} "
            "pictures; write it once for each of them, or not at all: then they come first."
        )


def _picture(given: Any, folder: Path, name: str) -> Picture:
    if isinstance(given, str) and given.strip():
        is_data = given.startswith("data:") or len(given) > 255
        return Picture.from_base64(given, name) if is_data else Picture.from_file(folder / given)
    # The form in which `datasets` stores images without decoding.
    if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
        picture = Picture(given["bytes"], name)
        picture.require_sound()
        return picture
    if isinstance(given, dict) and isinstance(given.get("path"), str):
        return Picture.from_file(folder / given["path"])
    if isinstance(given, dict) and isinstance(given.get("base64"), str):
        return Picture.from_base64(given["base64"], name)
    if hasattr(given, "convert"):
        return Picture.from_pil(given, name)
    raise UserError(
        f"{name} is a {type(given).__name__}; give the path of an image file, base64 text, or an "
        "Image column of datasets."
    )
