import io

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deltaloom.data.images import check_images, open_image
from deltaloom.data.read import read_data
from deltaloom.data.records import Problems
from deltaloom.data.rows import ImageRow
from deltaloom.data.settings import DataSettings
from deltaloom.errors import DataError


def png(color="red", size=(8, 6), mode="RGB", format="PNG"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, format)
    return file.getvalue()


def test_a_folder_for_each_class(tmp_path):
    for name, color in (("dogs", "red"), ("cats", "blue")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "train" / name / f"{index}.png").write_bytes(png(color))
    (tmp_path / "train" / ".cache").mkdir()
    data = read_data(DataSettings(train="train", eval_fraction=0.3), tmp_path, accepts=("image",))
    rows = data.train.rows + data.eval.rows
    assert min(row.where for row in rows) == "train/cats/0.png" and {row.label for row in data.eval.rows} == {"cats", "dogs"}
    assert len(rows) == 6 and open_image(rows[0].image).size == (8, 6)
    (tmp_path / "train" / "cats" / "x.txt").write_text("hello")
    (tmp_path / "train" / "birds").mkdir()
    with pytest.raises(DataError) as caught:
        read_data(DataSettings(train="train"), tmp_path, accepts=("image",))
    assert "x.txt: not an image" in str(caught.value) and "train/birds: no images" in str(caught.value)
    with pytest.raises(DataError, match="one folder for each class"):
        read_data(DataSettings(train="train/dogs"), tmp_path, accepts=("image",))
    with pytest.raises(DataError, match="is a folder"):
        read_data(DataSettings(train="train"), tmp_path, accepts=("text-label",))


def test_parquet_with_bytes_and_jsonl_with_paths(tmp_path):
    parquet.write_table(arrow.Table.from_pylist([{"image": {"bytes": png(), "path": None}, "label": 3}]), tmp_path / "a.parquet")
    row = read_data(DataSettings(train="a.parquet"), tmp_path, accepts=("image",)).train.rows[0]
    assert row.label == "3" and open_image(row.image).mode == "RGB"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png("blue", mode="RGBA"))
    (tmp_path / "pictures" / "all.jsonl").write_text('{"image": "a.png", "label": "x"}\n{"image": "b.png", "label": "x"}\n')
    with pytest.raises(DataError, match=r"all\.jsonl:2: no such image file: b\.png"):
        read_data(DataSettings(train="pictures/all.jsonl"), tmp_path, accepts=("image",))
    row = read_data(DataSettings(train="pictures/all.jsonl", max_rows=1), tmp_path, accepts=("image",)).train.rows[0]
    assert open_image(row.image).mode == "RGB" and row.source == ImageRow("x", row.image.read_bytes()).source


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(1, 255), length=st.integers(0, 400),
       format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]))
def test_damaged_images_are_noted_or_fine(position, byte, length, format):
    data = bytearray(png(format=format))
    data[position % len(data)] ^= byte
    check_images([ImageRow("a", bytes(data)), ImageRow("b", bytes(data[:length]))], Problems())


def test_what_is_no_image_or_too_large(monkeypatch):
    problems = Problems()
    check_images([ImageRow("a", b"hello"), ImageRow("b", png())], problems)
    with pytest.raises(DataError, match="a: not an image"):
        problems.check("x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    problems = Problems()
    check_images([ImageRow("b", png())], problems)
    with pytest.raises(DataError, match="too many pixels"):
        problems.check("x")
