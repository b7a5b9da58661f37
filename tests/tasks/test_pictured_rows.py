"""Pictures in the user's data: where they may be, and a sentence for each mistake."""

import base64
import json
import zlib
from io import BytesIO
from struct import pack

import pytest
from PIL import Image

from rlad.errors import UserError
from rlad.models.pictures import MAX_PIXELS, Picture, PicturedPrompt
from rlad.tasks import make_task
from rlad.tasks.pictured_rows import pictures_of_row


def png(colour="red", size=(8, 8)):
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def bomb(width, height):
    """A PNG of a few bytes that says that it unpacks to width x height pixels."""

    def chunk(kind, data):
        body = kind + data
        return pack(">I", len(data)) + body + pack(">I", zlib.crc32(body))

    header = pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(["red", "green", "blue"]):
        (tmp_path / f"pictures/{i}.png").write_bytes(png(colour))
    return tmp_path


def task_of(folder, rows):
    """A task of 40 rows for each split."""
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("validation", "test"):
        other = [row | {"prompt": f"{name} {i}", "images": []} for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, other)))
    return make_task(
        "jsonl",
        path=str(folder / "data.jsonl"),
        validation_path=str(folder / "validation.jsonl"),
        test_path=str(folder / "test.jsonl"),
    )


def test_paths_base64_and_content_parts(folder):
    rows = [
        {"prompt": "<image>What?", "answer": "a", "images": ["pictures/0.png"]},
        {"prompt": "Which?", "answer": "b", "images": base64.b64encode(png("green") * 9).decode()},
        {"prompt": "Data?", "answer": "b",
         "images": "data:image/png;base64," + base64.b64encode(png("blue")).decode()},
        {"prompt": [{"role": "user", "content": [
            {"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"},
            {"type": "text", "text": ": which?"}]}],
         "answer": "c", "images": ["pictures/1.png", {"path": "pictures/2.png"}]},
    ]  # fmt: skip
    task = task_of(folder, rows)
    problems = [task.problem("train", i) for i in range(4)]
    by_prompt = {problem.prompt: problem for problem in problems}
    several = by_prompt["<image> and <image>: which?"]
    assert [one.image().getpixel((0, 0)) for one in several.images] == [(0, 128, 0), (0, 0, 255)]
    assert by_prompt["<image>What?"].images[0].image().getpixel((3, 3)) == (255, 0, 0)
    assert by_prompt["Data?"].images[0].image().size == (8, 8)
    assert "images" not in several.metadata


def test_the_same_question_about_another_picture_is_another_problem(folder):
    rows = [{"prompt": "What?", "answer": "a", "images": [f"pictures/{i}.png"]} for i in range(3)]
    task = task_of(folder, rows)
    assert len({task.problem("train", i).key for i in range(3)}) == 3


@pytest.mark.parametrize(
    ("images", "prompt", "sentence"),
    [
        (["pictures/9.png"], "What?", r"line 1: picture '.*9\.png' cannot be read \(No such file"),
        (["data.jsonl"], "What?", "cannot be opened .of no known format.; give a PNG"),
        (["cut.png"], "What?", None),
        (
            ["bomb.png"],
            "What?",
            r"has (100000 x 90000|more than Pillow opens) pixels",
        ),
        (["pictures/0.png"], "<image> or <image>?", "has 2 times '<image>' and the row 1 pictures"),
        ([7], "What?", "is a int; give the path of an image file, base64 text"),
        (["data:image/png;base64,???"], "What?", "neither the path of a file nor base64"),
        (["pictures/0.png"] * 17, "What?", "has 17 pictures, but at most 16"),
    ],
)
def test_mistakes_are_sentences(folder, images, prompt, sentence):
    (folder / "bomb.png").write_bytes(bomb(100_000, 90_000))
    (folder / "cut.png").write_bytes(png(size=(64, 64))[:60])
    rows = [{"prompt": prompt, "answer": "a", "images": images}]
    if sentence is None:
        # A file whose head is whole is found to be damaged when it is unpacked.
        (picture,) = task_of(folder, rows).problem("train", 0).images
        with pytest.raises(UserError, match=r"cut\.png' is damaged .*; give a whole file"):
            picture.image()
        return
    with pytest.raises(UserError, match=sentence):
        task_of(folder, rows)


def test_size_is_bounded_before_pixels_are_unpacked():
    picture = Picture(bomb(MAX_PIXELS // 1000, 1001), "large.png")
    with pytest.raises(UserError, match=r"large\.png' has .* pixels"):
        picture.require_sound()


def test_blackened_pictures_keep_their_size_and_their_seed():
    plain = Picture(png("white", (40, 30)), "white")
    black = plain.corrupted(edge=14, seed=3)
    assert black.image().size == (40, 30)
    assert black != plain
    assert black == plain.corrupted(edge=14, seed=3)
    assert black != plain.corrupted(edge=14, seed=4)
    image = black.image()
    corners = [image.getpixel((x, y)) for y in (0, 14, 28) for x in (0, 14, 28)]
    assert set(corners) == {(0, 0, 0), (255, 255, 255)}
    # Squares are black or whole.
    assert all(image.getpixel((13, y)) == image.getpixel((0, y)) for y in range(14))


def test_a_prompt_is_its_tokens_and_its_pictures():
    red, blue = (Picture(png(colour)) for colour in ("red", "blue"))
    prompt = PicturedPrompt([1, 2], [red])
    assert prompt == PicturedPrompt([1, 2], [Picture(png("red"), "by another name")])
    assert prompt != PicturedPrompt([1, 2], [blue])
    assert prompt != (1, 2)
    assert prompt != (1, 2)
    assert len({prompt, PicturedPrompt([1, 2], [blue]), (1, 2)}) == 3
    assert [*prompt, 3] == [1, 2, 3]


def test_a_picture_is_upright_as_its_camera_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    buffer = BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, format="JPEG", exif=exif)
    picture = Picture(buffer.getvalue())
    assert picture.image().size == picture.corrupted(edge=14, seed=0).image().size == (30, 40)
    assert Picture.from_pil(Image.open(buffer), "").image().size == (30, 40)


def test_base64_may_have_broken_lines(folder):
    text = base64.encodebytes(png(size=(64, 64)) * 3).decode()
    assert "\n" in text[:80]
    (picture,) = (
        task_of(folder, [{"prompt": "?", "answer": "a", "images": text}]).problem("train", 0).images
    )
    assert picture.image().size == (64, 64)


def test_pictures_in_a_field_of_another_name_are_a_sentence(folder):
    data = "data:image/png;base64," + base64.b64encode(png()).decode()
    with pytest.raises(UserError, match=r"the field 'picture' holds pictures, but 'images' none"):
        task_of(folder, [{"prompt": "What?", "answer": "a", "picture": data}])


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"bytes": b"RIFF", "path": "said.wav"}, "sound"),
        ([{"bytes": b"....ftyp", "path": "seen.mp4"}], "films"),
        ({"bytes": b"...", "path": None}, "binary data"),
        ("data:audio/wav;base64,UklGRg==", "sound"),
    ],
)
def test_another_kind_of_column_is_named_as_what_it_is(value, kind):
    row = {"prompt": "What?", "answer": "a", "clip": value}
    with pytest.raises(
        UserError, match=rf"^row 1: the field 'clip' holds {kind}, but .* only pictures"
    ):
        pictures_of_row(row, "images", source="data.jsonl", where="row 1")


def test_a_path_that_is_none_is_a_sentence(folder):
    with pytest.raises(UserError, match=r"cannot be read .embedded null byte"):
        task_of(folder, [{"prompt": "?", "answer": "a", "images": ["a\0b"]}])
