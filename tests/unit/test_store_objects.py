"""Storage itself: atomic, durable, created once; and JSON that notices when it was altered."""

import contextlib
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore
from storage_faults import held

from diki_ray.errors import CorruptError, DiskFullError, StorageError, UserError
from diki_ray.store import objects as objects_module
from diki_ray.store.log import seal, unseal
from diki_ray.store.objects import BucketObjects, Objects

pytest_plugins = ["storage_fixtures"]
pytestmark = pytest.mark.usefixtures("fast")


class TestObjects:
    def test_put_and_get(self, objects):
        assert objects.get("a/b.json") is None
        assert objects.put("a/b.json", b"1")
        assert objects.put("a/b.json", b"2")
        assert objects.get("a/b.json") == b"2"
        assert [(i.path, i.num_bytes) for i in objects.list("a")] == [("a/b.json", 1)]
        assert objects.exists("a/b.json")
        assert not objects.exists("a")
        assert objects.folders("a") == ()
        objects.put("a/c/d", b"3")
        assert objects.folders("a") == ("c",)
        objects.delete(["a/b.json", "a/never-there.json"])
        assert objects.get("a/b.json") is None
        assert objects.list("nowhere") == ()

    def test_create_only_leaves_what_is_there(self, objects):
        assert objects.put("x", b"first", create_only=True)
        assert not objects.put("x", b"second", create_only=True)
        assert objects.get("x") == b"first"

    def test_of_many_creators_exactly_one_wins(self, objects):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: objects.put("x", b"%d" % i, create_only=True), range(64)))
        assert sum(won) == 1
        assert objects.get("x") == b"%d" % won.index(True)

    @pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "", "a\\b", "a\0b"])
    def test_paths_stay_below_the_root(self, objects, path):
        with pytest.raises(UserError, match="no object name"):
            objects.put(path, b"")

    def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(self, disk, monkeypatch):
        disk.put("a/first", b"1")
        calls = []
        for name in ("fsync", "link", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
        disk.put("a/new", b"1", create_only=True)
        disk.put("a/new", b"2")
        assert calls == ["fsync", "link", "fsync", "fsync", "replace", "fsync"]

    def test_half_written_files_are_invisible_and_swept_when_old(self, disk):
        disk.put("a/b", b"1")
        half = Path(disk.uri, "a", ".c.0123.tmp")
        half.write_bytes(b"half")
        assert [info.path for info in disk.list("")] == ["a/b"]
        assert disk.sweep(older_than_s=3600) == 0
        os.utime(half, (0, 0))
        assert disk.sweep(older_than_s=3600) == 4
        assert not half.exists()

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_named_with_its_free_bytes_and_the_old_bytes_stay(self, disk, monkeypatch, code):
        disk.put("a", b"old")

        def full(*_):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(DiskFullError, match=r"storage/a: no space left \([\d,]+ bytes free"):
                disk.put("a", b"new")
        assert disk.get("a") == b"old"
        assert [file.name for file in Path(disk.uri).iterdir()] == ["a"]
        disk.put("a", b"new")
        assert disk.get("a") == b"new"

    def test_other_errors_name_the_path(self, disk):
        disk.put("folder/x", b"")
        with pytest.raises(StorageError, match=r"cannot write .*folder"):
            disk.put("folder", b"")

    def test_a_file_system_without_hard_links_is_refused(self, disk, monkeypatch):
        def no_links(*_):
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(objects_module.os, "link", no_links)
        with pytest.raises(StorageError, match="no hard links"):
            held(disk)

    def test_a_bucket_that_ignores_conditions_is_refused(self):
        class Careless(BucketObjects):
            def put(self, path, data, create_only=False):
                return super().put(path, data)

        with pytest.raises(StorageError, match="If-None-Match is ignored"):
            held(Careless("memory://", MemoryStore()))

    def test_an_unknown_scheme_is_a_user_error(self):
        with pytest.raises(UserError, match="is no storage"):
            Objects.open("ftp://somewhere/x")


class TestSeal:
    @given(
        st.dictionaries(
            st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)
        ),
        st.data(),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_changed_byte_is_noticed(self, content, data):
        sealed = seal(content)
        assert unseal(sealed, "x") == content
        place = data.draw(st.integers(0, len(sealed) - 2))  # the last byte is a newline
        flipped = bytearray(sealed)
        flipped[place] ^= data.draw(st.integers(1, 255))
        for broken in (bytes(flipped), sealed[:place]):
            with contextlib.suppress(CorruptError):
                assert unseal(broken, "x") == content  # \u00e9 may have become \u00E9: another byte, the same content
