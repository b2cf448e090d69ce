"""What people name becomes rows: every input one, in order, readable or not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from diki_ray.data import prepare
from diki_ray.data.inputs import Row, from_json, is_collection, parts_of, to_json
from diki_ray.errors import DataError


def png(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def rows(*places: Path | str) -> list[Row]:
    parts = parts_of(map(str, places))
    assert [from_json(to_json(part)) for part in parts] == parts  # as they travel to the process that reads them
    found = [row for part in parts for row in part.read()]
    assert all(part.num_images in (None, len(list(part.read()))) for part in parts)
    return found


def test_files_folders_and_globs_are_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.png", "a.png", "deep/down/c.png", "other.txt"):
        png(tmp_path / "photos" / name) if name.endswith("png") else (tmp_path / "photos" / name).write_text("words")
    monkeypatch.chdir(tmp_path)
    folder = ["photos/a.png", "photos/b.png", "photos/deep/down/c.png"]
    found = rows("photos/b.png", "photos", "photos/*.png", "photos/**/*.png", "gone.png", "photos/other.txt")
    assert [row.image for row in found] == [
        "photos/b.png", *folder, *folder[:2], *folder, "gone.png", "photos/other.txt"
    ]  # fmt: skip
    assert [row.error for row in found if row.data is None] == ["no such file"]
    assert found[0].data == Path("photos/b.png").read_bytes()
    with pytest.raises(DataError, match="matches no image"):
        parts_of(["nothing/*.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no image in it"):
        parts_of(["empty"])


def test_parts_know_the_folder_that_relative_paths_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    (part,) = parts_of(["a.png"])
    monkeypatch.chdir("/")
    assert [row.error for row in part.read()] == [None]


def test_a_tar_gives_every_image_and_a_row_for_what_it_has_not(tmp_path: Path) -> None:
    image = png(tmp_path / "x.png").read_bytes()
    path = tar(tmp_path / "some.tar", {"1.png": image, "1.txt": b"a caption", "2.cls": b"3", "4.png": image})
    assert [(row.image, row.error) for row in rows(path)] == [
        (f"{path}#1", None),
        (f"{path}#4", None),
        (f"{path}#2", "no image"),
    ]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[:700])
    assert [row.image for row in rows(cut) if row.error]
    (gone,) = rows(tmp_path / "gone.tar")
    assert "gone.tar" in str(gone.error)


def test_a_prepared_data_set_loses_no_sample_however_damaged(tmp_path: Path) -> None:
    for n in range(6):
        png(tmp_path / "source" / ("cat", "dog")[n % 2] / f"{n}.png", ("red", "blue", "green")[n % 3])
    index = prepare.ensure(str(tmp_path / "source"), str(tmp_path / "prepared"))
    total = sum(split.num_samples for split in index.splits.values())
    assert [row.error for row in rows(index.uri)] == [None] * total
    shard = index.split("train").shards[0]
    path = Path(index.uri, shard.file)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    found = rows(index.uri)
    assert [row.image for row in found if row.error] == [f"{path}#0"]
    assert len(found) == total
    path.unlink()
    assert sum("missing" in str(row.error) for row in rows(index.uri)) == shard.num_samples


def test_what_is_more_than_one_image(tmp_path: Path) -> None:
    odd = png(tmp_path / "odd [1].png")
    assert [is_collection(str(place)) for place in (tmp_path, "a*.png", "x.tar", "s3://bucket/folder")] == [True] * 4
    assert [is_collection(place) for place in (str(odd), "a.png", "s3://b/a.jpg", "https://x.org/img?id=1")] == [
        False
    ] * 4
