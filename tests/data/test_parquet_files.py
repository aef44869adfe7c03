"""Images in Parquet files."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.containers import SHAPE, found_in, picture, write_structs
from weighmatch.data import members, parquet_files
from weighmatch.data.containers import decode_members, walk_members


def test_parquet_files_without_images_are_named_once(tmp_path):
    contents = [picture(k)[1] for k in range(3)]
    write_structs(tmp_path / "cut.parquet", contents, [None] * 3)
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    pq.write_table(pa.table({"score": [1.0]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    images, reasons = found_in(tmp_path)
    assert not images
    assert reasons == {
        "cut.parquet": members.DAMAGED,
        "numbers.parquet": "it has no column of bytes, and so no images; it has score: double",
        "two.parquet": "it has several columns of bytes (a, b); call that of the images image",
        "empty.parquet": "it holds no image",
    }


def test_rows_without_an_image_get_a_reason(tmp_path):
    pixels, content = picture(0)
    table = pa.table({"image": [content, None, b"text", content], "other": [b"x"] * 4})
    pq.write_table(table, tmp_path / "x.parquet")
    images, reasons = found_in(tmp_path)
    assert list(images) == ["x.parquet/0", "x.parquet/3"]
    np.testing.assert_array_equal(images["x.parquet/3"], pixels)
    assert reasons == {
        "x.parquet/1": "it is empty",
        "x.parquet/2": "it is a text file, not an image",
    }


def test_a_damaged_row_group_loses_its_own_rows_alone(tmp_path):
    contents = [picture(k)[1] for k in range(6)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": contents}), path, row_group_size=2)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(bytes(content))
    images, reasons = found_in(tmp_path)
    assert list(images) == [f"x.parquet/{k}" for k in (0, 1, 4, 5)]
    assert reasons == {f"x.parquet/{k}": members.DAMAGED_THERE for k in (2, 3)}


@pytest.mark.parametrize(
    "columns",
    [
        lambda contents: {"jpg": contents, "cls": [b"0"] * 3},
        lambda contents: {"image": pa.array(contents).dictionary_encode()},
        lambda contents: {"image": pa.array(contents).cast(pa.binary_view())},
        lambda contents: {"image": pa.array(contents, pa.large_binary()), "jpg": [b"x"] * 3},
    ],
)
def test_images_are_found_in_columns_of_any_bytes(tmp_path, columns):
    contents = [picture(k)[1] for k in range(3)]
    pq.write_table(pa.table(columns(contents)), tmp_path / "x.parquet")
    images, reasons = found_in(tmp_path)
    assert not reasons
    for k in range(3):
        np.testing.assert_array_equal(images[f"x.parquet/{k}"], picture(k)[0])


def test_what_a_parquet_file_has_in_place_of_images_is_said(tmp_path):
    write_structs(tmp_path / "paths.parquet", [None, None], ["a/0.png", "a/1.png"])
    lists = pa.array([[{"bytes": picture(0)[1], "path": "a"}]])
    pq.write_table(pa.table({"images": lists}), tmp_path / "lists.parquet")
    images, reasons = found_in(tmp_path)
    assert not images
    assert reasons.pop("lists.parquet").startswith(
        "it has no column of bytes, and so no images; it has images: list<"
    )
    assert reasons == {f"paths.parquet/{k}/{k}.png": parquet_files.NO_BYTES for k in range(2)}


def test_shards_of_a_row_group_read_it_once(tmp_path, monkeypatch):
    contents = [picture(k)[1] for k in range(60)]
    pq.write_table(pa.table({"image": contents}), tmp_path / "x.parquet")
    monkeypatch.setattr(parquet_files, "ROWS_AT_ONCE", 5)
    opened, read = parquet_files._open, []

    class Counted:
        def __init__(self, place):
            self.file = opened(place)

        def __enter__(self):
            return self.file

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def iter_batches(self, *given, **options):
            for part in self.file.iter_batches(*given, **options):
                read.append(len(part))
                yield part

    listed = list(walk_members(tmp_path))
    monkeypatch.setattr(parquet_files, "_open", Counted)

    def decode(first):
        return list(decode_members(tmp_path, listed[first : first + 6], SHAPE, "crop", "white"))

    for first in (*range(0, 60, 12), 6):  # every other shard, and then an earlier one
        for k, image in enumerate(decode(first), first):
            np.testing.assert_array_equal(image[0], picture(k)[0])
    assert sum(read) == 55 + 15
