import contextlib
import csv
import json
import string

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deltaloom.data import records
from deltaloom.data.records import Problems, read_records
from deltaloom.errors import DataError

ROWS = [{"prompt": "a, \"b\"", "completion": "c\nd"}, {"prompt": "é", "completion": "f"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path, **options):
    problems = Problems()
    found = read_records(path, problems, path.name, **options)
    problems.check("bad rows")
    return found


def test_every_kind_of_file_gives_the_same_fields(tmp_path):
    write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    write(tmp_path / "a.json", json.dumps(ROWS))
    write(tmp_path / "b.json", json.dumps({"data": ROWS, "version": 1}))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert [record.fields for record in read(path)] == ROWS, path.name


@pytest.mark.parametrize("data", [
    b'\xef\xbb\xbf{"a": 1}\n{"a": 2}',
    b'{"a": 1}\r\n\r\n  \n{"a": 2}\r\n', b'\n{"a": 1}\n{"a": 2}'])
def test_byte_order_mark_line_ends_and_blank_lines_do_no_harm(tmp_path, data):
    assert [record.fields for record in read(write(tmp_path / "a.jsonl", data))] == [{"a": 1}, {"a": 2}]


def test_places_are_lines_of_the_file(tmp_path):
    found = read(write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}'))
    assert [record.where for record in found] == ["a.jsonl:2", "a.jsonl:4"]
    found = read(write(tmp_path / "a.csv", '\ufeffa,b\n"x\ny",1\n\nz,2\n'))
    assert [record.where for record in found] == ["a.csv:2", "a.csv:5"]
    assert found[0].fields == {"a": "x\ny", "b": "1"}


def test_all_bad_rows_are_reported_at_once_and_at_most_20_listed(tmp_path):
    lines = ['{"a": 1}', "{", "[1]", "7", "null", '{"a": ' + "9" * 5000 + "}", "[" * 100_000, *["x"] * 30]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "a.jsonl", "\n".join(lines)))
    message = str(caught.value)
    assert "36 problems" in message and "and 16 more" in message
    assert len(caught.value.problems) == 21
    assert "a.jsonl:2: invalid JSON" in message and "a.jsonl:3: not a JSON object but a list" in message
    assert "a.jsonl:5: not a JSON object but null" in message


@pytest.mark.parametrize(("name", "data", "words"), [
    ("a.jsonl", b"", "is empty"),
    ("a.jsonl", b"\n \n", "no rows"),
    ("a.jsonl", b'{"a": "\x00"}', "NUL bytes"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}', "a.jsonl:2: not UTF-8"),
    ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
    ("a.json", '{"a": 1}'.encode("utf-16"), "UTF-16"),
    ("a.json", b'{"a": 1}\n{"a": 2}\n', "rename it to .jsonl"),
    ("a.json", b'{"rows": []}', "must hold a list"),
    ("a.json", b"[]", "no rows"),
    ("a.json", b"[1, 2]", "row 2: not a JSON object"),
    ("a.json", b"[" * 100_000, "cannot be read"),
    ("a.csv", b"a,b\n", "no rows"),
    ("a.csv", b"a,a\n1,2\n", "different name"),
    ("a.csv", b"a;b\n1;2\n", "separated by ';'"),
    ("a.csv", b"a,b\n1\n", "a.csv:2: 1 cell, the header has 2"),
    ("a.csv", b'a,b\n"1,2\n', "not a table"),
    ("a.parquet", b"PAR1 nonsense PAR1", "damaged parquet"),
    ("a.parquet", b"nonsense", "not a parquet"),
    ("a.txt", b"hello", "unknown kind of file"),
])
def test_unusable_files_say_why(tmp_path, name, data, words):
    with pytest.raises(DataError, match=words):
        read(write(tmp_path / name, data))


def test_missing_files_and_folders_say_what_to_do(tmp_path):
    write(tmp_path / "train.jsonl", '{"a": 1}')
    with pytest.raises(DataError, match=r"Did you mean 'train\.jsonl'"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="does not exist either"):
        read(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


def test_a_huge_line_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 100)
    with pytest.raises(DataError, match=r"a\.jsonl:2: a line of more than"):
        read(write(tmp_path / "a.jsonl", '{"a": 1}\n' + " " * 200))
    before = csv.field_size_limit()
    with pytest.raises(DataError):
        read(write(tmp_path / "a.csv", "a,b\n1," + "x" * 200))
    assert csv.field_size_limit() == before


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\nnonsense')
    assert len(read(path, limit=2)) == 2


def test_class_names_of_hugging_face_parquet(tmp_path):
    features = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
                "tags": {"feature": {"names": ["O", "B-X"], "_type": "ClassLabel"}, "_type": "Sequence"},
                "text": {"_type": "Value"}}
    table = arrow.Table.from_pylist([{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": -1, "tags": []}])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [record.fields for record in read(tmp_path / "a.parquet")] == [
        {"text": "a", "label": "pos", "tags": ["O", "B-X"]}, {"text": "b", "label": -1, "tags": []}]


LEAF = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers()
VALUE = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                     max_leaves=8)
NASTY = st.one_of(st.binary(max_size=200), VALUE.map(lambda value: json.dumps(value).encode()),
                  st.text(alphabet=string.printable + "\ufeff\u2028é\ud7ff", max_size=200).map(str.encode))


@pytest.mark.parametrize("suffix", sorted(records.READERS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(NASTY, max_size=4).map(b"\n".join))
@example(data=b"\r")
@example(data=b"PAR1" + b"\0" * 20 + b"PAR1")
def test_no_bytes_raise_anything_but_data_error(tmp_path, suffix, data):
    try:
        for record in read(write(tmp_path / f"a{suffix}", data)):
            assert isinstance(record.fields, dict)
    except DataError:
        pass


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_damaged_parquet_file_raises_data_error_or_reads(tmp_path, position, byte):
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS * 10), path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= byte
    with contextlib.suppress(DataError):
        read(write(path, bytes(data)))
