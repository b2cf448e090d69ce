"""Random kills over a long stream of tiny tasks on one cluster that stays up: python tests/soak/soak.py --kills 50

A worker, the store's actor or the driver gets SIGKILL at random moments; a driver that died is started again with the
same command. When the stream is learnt and kills are left, the next round learns it again in a storage of its own.
Passed: every round's modules and accuracy matrix are bit-equal to those of an undisturbed run, and afterwards there is
no process, actor, placement group, shared memory or half-written file that was not there before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from job_runs import GONE_WITHIN_S, RAY_IN_TESTS, session_processes, wait_until  # noqa: E402

from diki_ray.store.run_store import RunStore  # noqa: E402

DATA = ("digits", "gems", "chessboard", "planets", "mist", "flags")
SHOTS = (1, 2, 3)
WEIGHTS = {"worker": 4, "store": 2, "driver": 1}  # a driver's start takes as long as several tasks
VICTIMS = {"worker": r"ray::.*RayTrainWorker", "store": r"ray::.*StoreActor"}
RAYS_OWN_ACTOR = "AutoscalingCoordinator"
"""One a cluster: Ray Train starts it detached and keeps it."""
NOT_RAYS_OWN = rf"ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent|_?{RAYS_OWN_ACTOR})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause-s", type=float, nargs=2, default=(4.0, 25.0), help="seconds between two kills")
    parser.add_argument("--tasks", type=int, default=len(DATA) * len(SHOTS), help="of the stream")
    arguments = parser.parse_args()
    os.environ |= RAY_IN_TESTS | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    memory, processes = shared_memory(), set(session_processes(os.getsid(0)))
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder, arguments.tasks, random.Random(arguments.seed), tuple(arguments.pause_s))
    try:
        rounds = soak.run(arguments.kills)
        soak.check_the_cluster()
    finally:
        soak.stop()
    wait_until(
        lambda: not set(session_processes(os.getsid(0))) - processes, GONE_WITHIN_S, "the cluster's processes to end"
    )
    wait_until(lambda: not any(map(session_processes, soak.sessions)), GONE_WITHIN_S, "the drivers' processes to end")
    wait_until(lambda: not shared_memory() - memory, 60, f"shared memory {shared_memory() - memory} to be freed")
    half_written = list(folder.rglob(".*.tmp"))
    killed = dict(sorted(soak.killed.items()))
    minutes = (time.monotonic() - started) / 60
    print(
        f"{datetime.now(UTC):%Y-%m-%d}: {sum(killed.values())} kills ({killed}) over {rounds} rounds of "
        f"{arguments.tasks} tasks in {minutes:.0f} minutes, seed {arguments.seed}: modules and "
        f"accuracy matrices bit-equal; no process, actor, placement group or shared memory left; "
        f"{len(half_written)} temporary files of killed writers (never listed, swept by upkeep)."
    )
    shutil.rmtree(folder)
    return 0


class Soak:
    """One cluster, one stream, many kills."""

    def __init__(self, folder: Path, num_tasks: int, moments: random.Random, pause_s: tuple[float, float]) -> None:
        from ray.cluster_utils import Cluster

        self.folder, self.moments, self.pause_s = folder, moments, pause_s
        self.killed: Counter[str] = Counter()
        self.sessions: list[int] = []
        stream = [{"data": f"embedded:{d}", "shots": s, "name": f"{d}-{s}"} for s in SHOTS for d in DATA][:num_tasks]
        self.config = folder / "config.yaml"
        tree = yaml.safe_load((ROOT / "configs/debug.yaml").read_text())
        self.config.write_text(yaml.safe_dump(tree | {"tasks": stream}))
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        self.raylet = next(p.process.pid for p in self.cluster.head_node.all_processes["raylet"])

    def run(self, num_kills: int) -> int:
        """The number of rounds that it took."""
        expected = self.learn("undisturbed", 0)
        rounds = 0
        while sum(self.killed.values()) < num_kills:
            rounds += 1
            found = self.learn(f"round-{rounds}", num_kills)
            assert found == expected, f"round {rounds} differs from the undisturbed run: {self.folder}"
            print(f"round {rounds}: {sum(self.killed.values())} kills so far, bit-equal", flush=True)
        return rounds

    def learn(self, name: str, num_kills: int) -> tuple:
        """The stream, started again until it is learnt; what must not depend on the kills."""
        storage = self.folder / name
        command = [
            *(sys.executable, "jobs/continual.py", "--config", str(self.config)),
            *(f"run.storage={storage}", f"data.root={self.folder}/prepared", f"cluster.address={self.cluster.address}"),
            *("train.num_workers=2", "train.cpus_per_worker=0.5", "evaluate.cpus_per_worker=0.5", "train.epochs=2"),
            *("train.checkpoint_every_steps=1", "train.max_failures=-1", "train.collective_timeout_s=30"),
        ]
        while True:
            with open(self.folder / f"{name}.log", "ab") as log:
                job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
            self.sessions.append(job.pid)
            self.disturb(job, num_kills)
            if job.returncode == 0:
                break
            assert job.returncode == -signal.SIGKILL, (self.folder / f"{name}.log").read_text()[-3000:]
        modules = {e.task: e.digest for e in RunStore.open(str(storage), "debug").modules()}
        assert RunStore.open(str(storage), "debug").verify() == ()
        results = json.loads((storage / "runs/debug/results/results.json").read_text())
        return modules, results["accuracy"], results["zero_shot"]

    def disturb(self, job: subprocess.Popen[bytes], num_kills: int) -> None:
        """Kills until the job has ended."""
        next_kill = time.monotonic() + self.moments.uniform(*self.pause_s)
        while job.poll() is None:
            time.sleep(0.05)
            if sum(self.killed.values()) < num_kills and time.monotonic() >= next_kill and self.kill_one(job):
                next_kill = time.monotonic() + self.moments.uniform(*self.pause_s)

    def kill_one(self, job: subprocess.Popen[bytes]) -> bool:
        """False while a driver only starts: on a slow machine nothing but such drivers would be killed."""
        victims = {kind: self.children(pattern) for kind, pattern in VICTIMS.items()} | {"driver": [job.pid]}
        if not victims["store"]:
            return False
        kinds = sorted(kind for kind, pids in victims.items() if pids)
        kind = self.moments.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        os.kill(self.moments.choice(sorted(victims[kind])), signal.SIGKILL)
        self.killed[kind] += 1
        print(f"kill {sum(self.killed.values())}: {kind}", flush=True)
        return True

    def children(self, pattern: str) -> list[int]:
        """The raylet's worker processes with such a name."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                name = (entry / "cmdline").read_text() if entry.name.isdigit() else ""
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1] if name else ""
                if re.match(pattern, name) and int(parent) == self.raylet:
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended since it was listed
        return found

    def check_the_cluster(self) -> None:
        """After the last driver has ended, its cluster holds nothing of any of them."""
        import ray

        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        wait_until(lambda: not self.children(NOT_RAYS_OWN), 60, f"workers {self.children(NOT_RAYS_OWN)} to end")
        groups = ray.util.placement_group_table().values()
        assert all(group["state"] == "REMOVED" for group in groups), groups
        named = ray.util.list_named_actors(all_namespaces=True)
        assert all(actor["name"] == RAYS_OWN_ACTOR for actor in named), named
        free, there = ray.available_resources(), ray.cluster_resources()
        assert free.get("CPU") == there.get("CPU"), (free, there)
        ray.shutdown()

    def stop(self) -> None:
        import ray

        ray.shutdown()  # a failed check leaves it connected, and then the cluster can't be ended
        self.cluster.shutdown()


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


if __name__ == "__main__":
    sys.exit(main())
