"""A file system that really fills up: a tmpfs of one megabyte, in a mount namespace of the test's own."""

import subprocess
import sys
from pathlib import Path

import pytest

IN_A_FULL_DISK = """
import sys
from pathlib import Path
from diki_ray.errors import DiskFullError
from diki_ray.store.run_store import RunStore
from diki_ray.store.process import this_process

disk = Path(sys.argv[1])
ballast = disk / "ballast"
ballast.write_bytes(bytes(300_000))
store = RunStore.open(str(disk / "storage"), "run")
epoch = store.acquire(this_process())
committed = []

def commit(number):
    return store.commit_module(epoch, f"k-{number}", f"task-{number}", b"%d" % number + b"prompts" * 9_000)

while True:
    number = len(committed)
    try:
        store.save_checkpoint(epoch, f"k-{number}", 1, b"state" * 5_000)
        committed.append(commit(number))
    except DiskFullError as error:
        print(error)
        assert str(disk / "storage") in str(error) and "bytes free" in str(error), error
        break
assert 3 < len(committed) < 20
there = RunStore.open(str(disk / "storage"), "run")
assert there.modules() == tuple(committed) and there.verify() == ()
ballast.unlink()
again = commit(number)
there = RunStore.open(str(disk / "storage"), "run")
assert there.modules() == (*committed, again) and there.verify() == ()
store.release(epoch)
"""


def test_a_full_disk_is_a_clear_error_and_works_again_after_space_is_freed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1"'
    namespace = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*namespace, "sh", "-c", mount, "-", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace of the test's own")
    command = [*namespace, "sh", "-c", f'{mount} && exec "$2" -c "$3" "$1"', "-", str(disk)]
    done = subprocess.run([*command, sys.executable, IN_A_FULL_DISK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no space left" in done.stdout
