"""Image columns of `datasets` as users have them: a parquet file, a folder of `save_to_disk` whose
images come as those of Pillow, and images kept as paths."""

import pytest
from PIL import Image

pytestmark = pytest.mark.datasets
datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")

from rlad.errors import UserError
from rlad.tasks import make_task
from rlad.tasks.base import SPLITS

COLOURS = ("red", "green", "blue")


def image(number, mode="RGB"):
    return Image.new("RGB", (8, 6 + number % 5), COLOURS[number % 3]).convert(mode)


def data_set(column, values, **feature):
    kind = datasets.Image(**feature)
    features = {
        "prompt": datasets.Value("string"),
        "answer": datasets.Value("string"),
        column: datasets.List(kind) if column == "images" else kind,
    }
    number = len(values)
    rows = {
        "prompt": [f"<image>Colour {i}?" if i % 2 else f"Colour {i}?" for i in range(number)],
        "answer": [COLOURS[i % 3] for i in range(number)],
        column: values,
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def assert_pictures_are_read(path, **settings):
    task = make_task("jsonl", path=str(path), **settings)
    found = [task.problem(s, i) for s in SPLITS for i in range(task.num_problems(s))]
    assert len(found) == 40
    for problem in found:
        (picture,) = problem.images
        number = int(problem.prompt.rpartition(" ")[2].strip("?"))
        assert picture.image().size == (8, 6 + number % 5)
        wanted = image(number).getpixel((0, 0))
        assert picture.image().getpixel((3, 3)) == wanted
        assert COLOURS[number % 3] == problem.answer
        # What is not plain text has no place in a privileged teacher's template.
        assert not problem.metadata


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_parquet_file_with_the_bytes_of_images(tmp_path, column):
    values = [image(i) if column == "image" else [image(i)] for i in range(40)]
    data_set(column, values).to_parquet(tmp_path / "data.parquet")
    settings = {} if column == "images" else {"images_field": "image"}
    assert_pictures_are_read(tmp_path / "data.parquet", **settings)


@pytest.mark.parametrize("decode", [True, False])
def test_a_saved_data_set_whose_images_are_pillows_or_bytes(tmp_path, decode):
    values = [image(i, ("RGB", "RGBA", "P")[i % 3]) for i in range(40)]
    data_set("image", values, decode=decode).save_to_disk(tmp_path / "saved")
    assert_pictures_are_read(tmp_path / "saved", images_field="image")


def test_images_that_a_parquet_file_names_by_their_paths(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        image(i).save(tmp_path / f"pictures/{i}.png")
    values = [{"bytes": None, "path": f"pictures/{i}.png"} for i in range(40)]
    table = data_set("images", [[one] for one in values], decode=False)
    table.to_parquet(tmp_path / "data.parquet")
    assert_pictures_are_read(tmp_path / "data.parquet")
    (tmp_path / "pictures/7.png").unlink()
    with pytest.raises(UserError, match=r"row 8: picture '.*7\.png' cannot be read \(No such file"):
        make_task("jsonl", path=str(tmp_path / "data.parquet"))


def test_rows_without_an_image_are_texts(tmp_path):
    values = [image(i) if i % 2 else None for i in range(40)]
    rows = data_set("image", values).rename_column("prompt", "question")
    rows = rows.map(lambda row: {"question": row["question"].replace("<image>", "")})
    rows.to_parquet(tmp_path / "data.parquet")
    task = make_task(
        "jsonl",
        path=str(tmp_path / "data.parquet"),
        prompt_field="question",
        images_field="image",
    )
    found = [task.problem("train", i) for i in range(task.num_problems("train"))]
    assert {len(problem.images) for problem in found} == {0, 1}


def test_a_column_of_images_by_another_name_is_a_sentence(tmp_path):
    data_set("image", [image(i) for i in range(40)]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"row 1: the field 'image' holds pictures"):
        make_task("jsonl", path=str(tmp_path / "data.parquet"))
