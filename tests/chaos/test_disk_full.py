"""A file system that really fills up: a tmpfs of one megabyte, in a mount namespace of the test's own."""

import subprocess
import sys
from pathlib import Path

import pytest

from diki_ray.data.prepare import ensure

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


TRAINS = """
set -u
mount -t tmpfs -o size=3m tmpfs "$1" || exit 99
job() { "$2" jobs/continual.py --config debug --storage "$1/storage" "data.root=$3" train.epochs=2 \\
        train.checkpoint_every_steps=1 evaluate.cpus_per_worker=0.5 train.cpus_per_worker=0.5; }
mkdir "$1/storage"
head -c "$4" /dev/zero > "$1/ballast"
job "$@"; echo "first: $?"
rm "$1/ballast"
job "$@"; echo "second: $?"
"$2" jobs/store.py verify --storage "$1/storage" --run debug; echo "verify: $?"
head -c 10m /dev/zero > "$1/ballast"
"$2" jobs/evaluate.py --storage "$1/storage" --run debug --label-space all; echo "evaluate: $?"
"$2" jobs/evaluate.py --storage "$1/storage" --run debug --label-space all --no-cache; echo "no cache: $?"
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_disk_that_fills_in_training_and_in_evaluation_costs_nothing_that_was_committed(
    tmp_path: Path, prepared: Path
) -> None:
    for task in ("digits", "gems"):
        ensure(f"embedded:{task}", str(prepared), shots=4)
    disk = tmp_path / "disk"
    disk.mkdir()
    words = (str(disk), sys.executable, str(prepared), str(3 * 2**20 - 60_000))
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", TRAINS, "-", *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=500,
    )
    if done.returncode == 99:
        pytest.skip("no file system can be mounted here, not even in a namespace of the test's own")
    told = done.stdout + done.stderr
    assert "Traceback" not in told
    assert "first: 2" in told, told
    assert "no space left" in told
    assert "second: 0" in told, told
    assert "verify: 0" in told, told
    assert "evaluate: 0" in told or "evaluate: 2" in told, told  # what it keeps has no room; said in a sentence
    assert "no cache: 0" in told, told
