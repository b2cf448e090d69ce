"""Files by one name, local or remote; and objects that are read in part and written as their bytes come."""

import os
from pathlib import Path

import pytest

from diki_ray.errors import DataError, DiskFullError, StorageError
from diki_ray.store.files import delete, list_files, open_writer, read_bytes, scheme_of, write_bytes

pytest_plugins = ["storage_fixtures"]
pytestmark = pytest.mark.usefixtures("fast")


def test_any_part_of_an_object_is_read(objects):
    objects.put("a/b", b"0123456789")
    parts = [objects.get("a/b", start, stop) for start, stop in ((0, None), (3, None), (3, 5), (0, 4), (8, 8))]
    assert parts == [b"0123456789", b"3456789", b"34", b"0123", b""]
    assert objects.get("a/c", 3, 5) is None


def test_an_object_written_as_it_comes_is_there_once_its_block_has_ended(objects):
    with objects.open_writer("a/b") as file:
        file.write(b"first ")
        assert objects.get("a/b") is None
        file.write(b"second")
    assert objects.get("a/b") == b"first second"
    assert [info.path for info in objects.list("")] == ["a/b"]


def test_an_object_whose_block_met_an_error_is_not_there(objects):
    with pytest.raises(ValueError, match="of the caller"), objects.open_writer("a/b") as file:  # noqa: PT012
        file.write(b"first")
        raise ValueError("of the caller")  # which is not told as an error of the storage
    assert objects.get("a/b") is None
    assert objects.list("") == ()


def test_a_disk_that_fills_while_a_file_is_written_leaves_the_old_one(disk, monkeypatch):
    disk.put("a", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no space left"), disk.open_writer("a") as file:
        file.write(b"new")
    assert disk.get("a") == b"old"
    assert [path.name for path in Path(disk.uri).iterdir()] == ["a"]


def test_local_files_by_relative_and_absolute_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bytes("x", b"1")
    write_bytes("deep/er/y", b"234")
    with open_writer(str(tmp_path / "new" / "z")) as file:
        file.write(b"5")
    assert list_files(".") == ["deep/er/y", "new/z", "x"]
    assert read_bytes("deep/../deep/er/y", 1, 2) == b"3"
    assert read_bytes(str(tmp_path / "deep/er/y"), 2, 99) == b"4"
    delete("x")
    delete("x")
    with pytest.raises(FileNotFoundError):
        read_bytes("x")
    with pytest.raises(StorageError, match="cannot read deep"):
        read_bytes("deep")


def test_a_file_of_any_name_is_read(tmp_path):
    (tmp_path / "a\\b.png").write_bytes(b"1")
    assert read_bytes(f"{tmp_path}/a\\b.png") == b"1"


@pytest.mark.parametrize("uri", ["a/..", "s3://bucket/..", "s3://bucket/a\\b", "s3://bucket/", "https://host/a\0b"])
def test_what_names_no_file_is_a_data_error(uri):
    with pytest.raises(DataError, match="names no file"):
        write_bytes(uri, b"")
    if scheme_of(uri):
        with pytest.raises(DataError, match="names no file"):
            read_bytes(uri)
