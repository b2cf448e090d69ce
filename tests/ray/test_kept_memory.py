"""Actors that make one pass of a model after another keep a pass's memory for the next, as counted by the system."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from PIL import Image
from tiny_backbone import write_tiny_backbone

from diki_ray.runs.cluster import keeps_memory

VARIABLES = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
ROOT = Path(__file__).parents[2]
PAGES = 100 * 2**20 // 4096


@ray.remote
class Passes:
    def cleared(self) -> int:
        """How many pages the system clears for 100 MB that were taken and freed before, in a thread of its own."""
        counted = list[int]()

        def take() -> None:
            for _ in range(6):  # the first few find their places
                before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
                torch.ones(PAGES * 4096, dtype=torch.uint8)
                counted.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return counted[-1]


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.cluster
@pytest.mark.usefixtures("nothing_set")
def test_what_a_pass_took_is_there_for_the_next(local_cluster: str) -> None:
    def cleared(**options: Any) -> int:
        actor = Passes.options(num_cpus=0, **options).remote()
        return int(ray.get(actor.cleared.remote()))

    assert cleared(runtime_env=keeps_memory()) < cleared() / 10


@pytest.mark.usefixtures("nothing_set")
def test_what_the_user_has_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(keeps_memory()["env_vars"]) == ["GLIBC_TUNABLES"]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    assert keeps_memory() == {}


@pytest.mark.cluster
@pytest.mark.usefixtures("nothing_set")
def test_workers_of_every_kind_keep_it(
    local_cluster: str, prepared: Path, tmp_path: Path, job: Callable[..., tuple[int, str, str]]
) -> None:
    """Each process that loads this backbone writes down what Ray calls it and what its memory is told."""
    seen, backbone = tmp_path / "seen", write_tiny_backbone(tmp_path)
    with backbone.open("a") as file:
        file.write(
            "\nimport os, pathlib\n"
            "name = pathlib.Path('/proc/self/cmdline').read_text().split(chr(0))[0].split('.')[0]\n"
            f"with open({str(seen)!r}, 'a') as file:\n"
            "    file.write(f\"{name} {os.environ.get('GLIBC_TUNABLES')}\\n\")\n"
        )
    run = [f"run.storage={tmp_path / 'storage'}", f"data.root={prepared}", f"backbone.name={backbone}"]
    learnt = job("continual", "--config", ROOT / "configs" / "debug.yaml", *run)
    assert learnt[0] == 0, learnt
    where = ("--storage", tmp_path / "storage", "--run", "debug", "--backbone", backbone)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 40), "red").save(images / "red.png")
    told = job("predict", images, *where, "--num-workers", "1", "--output", tmp_path / "answers.jsonl")
    assert told[0] == 0, told
    kept = keeps_memory()["env_vars"]["GLIBC_TUNABLES"]
    keeping = {line.split()[0] for line in seen.read_text().splitlines() if line.endswith(f" {kept}")}
    assert keeping == {"ray::RayTrainWorker", "ray::EvaluationWorker", "ray::MapWorker(MapBatches(Worker))"}
