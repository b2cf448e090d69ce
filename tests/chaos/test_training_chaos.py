"""Recovery of training under real kills, on real local clusters: modules, statistics, ledger and accuracy matrix are
bit-equal to an undisturbed run's (a module's bytes hold its parameters, its Gaussian and what it consumed).

Every run is the job as a user starts it, in a process of its own; faults are deterministic by (task, rank, step) and
counted (diki_ray/runs/train/faults.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from job_runs import OVERRIDES, Job, Run, assert_equal, wait_until
from learning import evaluated, learnt, planned

from diki_ray.learning.module import TaskModule
from diki_ray.store.log import digest_of
from diki_ray.store.run_store import RunStore

pytestmark = pytest.mark.timeout(600)


def test_a_worker_and_the_store_killed_in_the_middle_of_tasks_change_nothing(tmp_path: Path, prepared: Path) -> None:
    """Compared with the same stream learnt and evaluated in this process, which has no cluster to be disturbed on."""
    prompts = {"image_depth": 2, "image_length": 2, "text_depth": 2, "text_length": 2}
    plan = planned(prepared, prompts, *OVERRIDES)
    store = learnt(plan)
    run = Run(tmp_path, prepared)
    done = run.start(
        "train.max_failures=1",
        faults=[
            {"kind": "kill-worker", "task": "digits", "rank": 1, "step": 4},
            {"kind": "kill-store", "task": "gems", "rank": 0, "step": 2},
        ],
    )
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 2
    assert run.digests() == {task.name: digest_of(store.blobs[task.key]) for task in plan.tasks}
    evaluation = evaluated(plan, store)
    assert run.results()["accuracy"] == evaluation.accuracy().round(6).tolist()  # as results.json has it
    assert run.results()["zero_shot"] == evaluation.zero_shot().round(6).tolist()


def importing(job: Job) -> list[int]:
    """The workers that have begun to import what they train with."""
    found = []
    for pid in job.processes():
        with contextlib.suppress(OSError):  # it ended since it was listed
            place = Path(f"/proc/{pid}")
            is_worker = (place / "cmdline").read_text().startswith("ray::RayTrainWorker")
            if is_worker and "torchvision" in (place / "maps").read_text():
                found.append(pid)
    return found


@pytest.mark.long
def test_a_worker_killed_while_it_starts_is_followed_by_another_and_costs_no_restart(
    tmp_path: Path, undisturbed: Run
) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    job = run.begin("train.max_failures=0")
    wait_until(lambda: bool(importing(job)), 120, "a worker to import what it trains with")
    os.kill(importing(job)[0], signal.SIGKILL)
    done = job.wait()
    assert done.returncode == 0, done.stderr
    assert_equal(run, undisturbed)


@pytest.mark.long
def test_a_worker_killed_in_the_middle_of_checkpoints_and_commits_changes_nothing(
    tmp_path: Path, undisturbed: Run
) -> None:
    """On either side of what becomes durable: what was not acknowledged is done again, what was is not, whether or not
    the others had heard of it."""
    run = Run(tmp_path, undisturbed.prepared)
    kill = {"kind": "kill-worker", "rank": 0}
    done = run.start(
        "train.max_failures=4",
        faults=[
            kill | {"at": "checkpoint", "task": "digits", "step": 2},
            kill | {"at": "checkpointed", "task": "digits", "step": 4},
            kill | {"at": "commit", "task": "digits", "step": 6},
            kill | {"at": "committed", "task": "gems", "step": 6},
        ],
    )
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 4
    assert_equal(run, undisturbed)


@pytest.mark.long
def test_the_driver_and_then_the_whole_cluster_killed_change_nothing(tmp_path: Path, undisturbed: Run) -> None:
    """Both in the middle of a task; then the newest checkpoint is damaged, and everything of Ray's own is garbled."""
    run = Run(tmp_path, undisturbed.prepared)
    faults = [
        {"kind": "kill-driver", "task": "digits", "rank": 0, "step": 4},
        {"kind": "hang", "task": "gems", "rank": 1, "step": 5},
    ]
    first = run.begin(faults=faults)
    assert first.wait().returncode == -9
    assert run.digests() == {}
    damage(run.checkpoints()[-1])
    garble_rays_own_files(tmp_path / "storage/ray")

    second = run.begin("train.collective_timeout_s=200", faults=faults)
    wait_until(lambda: run.has_fired(1), 200, "the second task to come to step 5")
    wait_until(lambda: run.newest_step() == 5, 20, "the checkpoint of step 5")
    second.kill_all()
    assert list(run.digests()) == ["digits"]  # what was acknowledged is there
    damage(run.checkpoints()[-1])
    garble_rays_own_files(tmp_path / "storage/ray")

    done = run.start(faults=faults)
    assert done.returncode == 0, done.stderr
    assert run.results()["trained"] == ["gems"]
    assert "digits: learnt already" in done.stdout
    assert run.num_fired() == 2
    assert_equal(run, undisturbed)
    for killed in (first, second):
        killed.assert_nothing_is_left()


@pytest.mark.long
def test_another_number_of_workers_from_the_middle_of_an_epoch_on_changes_nothing(
    tmp_path: Path, undisturbed: Run
) -> None:
    """Two workers, killed with their driver in the first task; one, killed in the second; then two again."""
    run = Run(tmp_path, undisturbed.prepared)
    faults = [
        {"kind": "kill-driver", "task": "digits", "rank": 0, "step": 4},
        {"kind": "kill-driver", "task": "gems", "rank": 0, "step": 1},
    ]
    assert run.start(faults=faults).returncode == -9
    assert run.start("train.num_workers=1", faults=faults).returncode == -9
    assert list(run.digests()) == ["digits"]
    done = run.start(faults=faults)
    assert done.returncode == 0, done.stderr
    assert run.num_fired() == 2
    assert_equal(run, undisturbed)
    world_sizes = [e.metadata["world_sizes"] for e in RunStore.open(f"{tmp_path}/storage", "debug").modules()]
    assert world_sizes == [[[0, 2], [4, 1]], [[0, 1], [1, 2]]]


@pytest.mark.long
def test_a_rank_not_finite_or_hanging_is_dealt_with_and_a_second_driver_refused(
    tmp_path: Path, undisturbed: Run
) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    job = run.begin(
        faults=[
            {"kind": "nan", "task": "digits", "rank": 1, "step": 1},
            {"kind": "hang", "task": "gems", "rank": 1, "step": 3},
        ]
    )
    wait_until(lambda: run.has_fired(1), 200, "the second task to come to step 3")
    second = run.start()
    assert second.returncode == 2
    assert f"(pid {job.process.pid} on " in second.stderr
    assert "run.take_over=true" in second.stderr

    done = job.wait()
    assert done.returncode == 0, done.stderr
    digests, expected = run.digests(), undisturbed.digests()
    assert digests["gems"] == expected["gems"]  # the hang was noticed in 15 s, and cost nothing but time
    assert digests["digits"] != expected["digits"]  # one step fewer
    module = TaskModule.from_bytes(RunStore.open(f"{tmp_path}/storage", "debug").read_module(digests["digits"]))
    assert module.provenance["num_nonfinite_steps"] == 1
    assert all(np.isfinite(p).all() for p in module.parameters.values())


@pytest.mark.long
def test_nothing_but_not_finite_stops_with_the_keys_and_commits_nothing(tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    done = run.start(faults=[{"kind": "nan", "task": "digits", "rank": 0, "step": s} for s in range(3)])
    assert done.returncode == 2
    assert "not finite in 3 batches in a row" in done.stderr
    assert "last batch: " in done.stderr
    assert run.digests() == {}


@pytest.mark.long
def test_bad_data_on_one_rank_ends_all_of_them_with_its_sentence(tmp_path: Path, undisturbed: Run) -> None:
    """One image of one rank's batch over the budget, with no restart allowed: it needs none, and no rank waits."""
    prepared = next(folder for folder in sorted(undisturbed.prepared.rglob("index.json")) if "digits" in str(folder))
    dataset = tmp_path / "digits"
    shutil.copytree(prepared.parent, dataset)
    damage_one_image(dataset)
    config = yaml.safe_load(Path("configs/debug.yaml").read_text())
    config["tasks"] = [{"data": str(dataset)}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run = Run(tmp_path, undisturbed.prepared)
    job = run.begin("train.max_failures=0", config=str(tmp_path / "config.yaml"))
    done = job.wait()
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert str(dataset) in done.stderr
    assert "Traceback" not in done.stderr
    assert run.digests() == {}
    job.assert_nothing_is_left()


@pytest.mark.long
def test_a_sequential_method_killed_in_the_middle_of_tasks_goes_on_bit_equal(tmp_path: Path, undisturbed: Run) -> None:
    """Each task starts where the one before ended, and the second is held back by the Fisher information of the
    first: a worker is lost in the first, the driver and all of its cluster in the second."""
    config = yaml.safe_load(Path("configs/debug.yaml").read_text())
    config["method"] = {"name": "sequential_lora", "image_depth": 1, "text_depth": 1, "against_forgetting": "ewc"}
    config["train"] |= {"optimizer": "adamw", "lr": 0.01}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    path = str(tmp_path / "config.yaml")
    expected = Run(tmp_path / "expected", undisturbed.prepared)
    done = expected.start(config=path)
    assert done.returncode == 0, done.stderr

    run = Run(tmp_path / "killed", undisturbed.prepared)
    faults = [
        {"kind": "kill-worker", "task": "digits", "rank": 1, "step": 4},
        {"kind": "kill-driver", "task": "gems", "rank": 0, "step": 3},
    ]
    assert run.start("train.max_failures=1", faults=faults, config=path).returncode == -9
    assert list(run.digests()) == ["digits"]
    done = run.start(faults=faults, config=path)
    assert done.returncode == 0, done.stderr
    assert run.results()["trained"] == ["gems"]
    assert run.num_fired() == 2
    assert_equal(run, expected)
    store = RunStore.open(f"{tmp_path}/killed/storage", "debug")
    first, second = (TaskModule.from_bytes(store.read_module(digest)) for digest in run.digests().values())
    assert any(name.startswith("fisher/") for name in second.parameters)
    assert not np.array_equal(first.parameters["image.layer0.q_up"], second.parameters["image.layer0.q_up"])


def damage(file: Path) -> None:
    blob = bytearray(file.read_bytes())
    blob[len(blob) // 2] ^= 1
    file.write_bytes(bytes(blob))


def damage_one_image(dataset: Path) -> None:
    """The first training image of a prepared data set; the others stay as they are."""
    shard = next(iter(sorted(dataset.rglob("*train*.tar"))))
    data = bytearray(shard.read_bytes())
    data[512 : 512 + 64] = bytes(64)  # a tar member's bytes begin after its header's 512
    shard.write_bytes(bytes(data))


def garble_rays_own_files(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    for number, file in enumerate(files):
        file.write_bytes(b"" if number % 2 else file.read_bytes()[:10] + b"\0garbled")
    run_folders = [entry for entry in folder.iterdir() if entry.is_dir()]
    assert run_folders  # Ray has its folder there, or this test looks at the wrong place
    for entry in run_folders:
        (entry / "checkpoint_manager_snapshot.json").write_text(json.dumps({"version": 3})[:7])
