"""What goes wrong around a run: one sentence, exit code 2, nothing half-written (the configuration's own errors are in
tests/unit/test_config.py)."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

DEBUG = Path(__file__).parents[2] / "configs" / "debug.yaml"


@pytest.fixture
def said_by(job: Callable[..., tuple[int, str, str]], local_cluster: str) -> Callable[..., str]:
    """The last line that jobs/continual.py says of the debug stream with these overrides; it has to end with code 2."""

    def call(*overrides: str) -> str:
        code, _, errors = job("continual", "--config", DEBUG, *overrides)
        assert code == 2
        return errors.strip().splitlines()[-1]

    return call


CASES = [
    ("storage that cannot be written", ["run.storage=/proc/nowhere"], "/proc/nowhere"),
    ("more workers than CPUs", ["train.num_workers=20"], "needs 20 CPUs"),
    ("more evaluation workers than CPUs", ["evaluate.num_workers=9"], "needs 9 CPUs"),
    ("a GPU where there is none", ["train.device=cuda"], "Ray sees 0 GPUs"),
    ("a calibration without what it needs", ["calibration.form=validated", "calibration.slope=0"], "calibration.slope"),
]


@pytest.mark.parametrize(("overrides", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_error_is_one_sentence(
    overrides: list[str], says: str, tmp_path: Path, prepared: Path, said_by: Callable[..., str]
) -> None:
    said = said_by(f"run.storage={tmp_path}/s", f"data.root={prepared}", *overrides)
    assert said.startswith("error: ")
    assert says in said
    assert not list(tmp_path.rglob("results.json"))


def test_a_port_that_is_taken(tmp_path: Path, prepared: Path, said_by: Callable[..., str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = said_by(f"run.storage={tmp_path}/s", f"data.root={prepared}", f"telemetry.port={port}")
    assert str(port) in said


def test_deepspeed_that_is_not_installed(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, said_by: Callable[..., str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    said = said_by(f"run.storage={tmp_path}/s", f"data.root={prepared}", "train.strategy=deepspeed")
    assert "DeepSpeed is not installed here; `DS_BUILD_OPS=0 pip install 'diki-ray[deepspeed]'` on every node" in said


@pytest.mark.long
def test_a_shard_that_is_missing(tmp_path: Path, said_by: Callable[..., str]) -> None:
    from diki_ray.data import prepare

    index = prepare.ensure("embedded:digits", str(tmp_path / "prepared"), shots=4)
    shard = Path(index.uri, index.split("train").shards[0].file)
    shard.unlink()
    said = said_by(f"run.storage={tmp_path}/s", f"data.root={tmp_path}/prepared", f"tasks=[{{data: {index.uri}}}]")
    assert shard.name in said
    assert "missing" in said


def test_a_damaged_index(tmp_path: Path, said_by: Callable[..., str]) -> None:
    from diki_ray.data import prepare

    index = prepare.ensure("embedded:digits", str(tmp_path / "prepared"), shots=4)
    path = Path(index.uri, "index.json")
    path.write_text(path.read_text().replace('"zero"', '"nought"'))
    said = said_by(f"run.storage={tmp_path}/s", f"tasks=[{{data: {index.uri}}}]")
    assert "index.json" in said


def test_relative_storage_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from diki_ray.config import load
    from diki_ray.errors import ConfigError
    from diki_ray.runs import run_cluster

    config = load(DEBUG)
    with pytest.raises(ConfigError, match="would lie in the job's temporary folder and be lost"):
        run_cluster._check_storage(config)


REFUSALS = [
    (
        "cluster.address=10.0.0.1:6379",
        RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\nThis process ..."),
        r"Version mismatch.*both sides run the same Ray version",
    ),
    (
        "cluster.num_cpus=2",
        Exception("The current node timed out during startup. This could happen because ..."),
        r"could be started on this machine \(The current node timed out during startup.*run the same command again",
    ),
]


@pytest.mark.parametrize(("override", "refusal", "says"), REFUSALS, ids=["another Ray version", "a busy machine"])
def test_a_cluster_that_is_not_to_be_had(
    override: str, refusal: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions cannot be in one environment, nor a machine be made busy, so what Ray says is put into its mouth."""
    import ray

    from diki_ray.config import load
    from diki_ray.errors import ConfigError
    from diki_ray.runs import run_cluster

    def refuse(**options: object) -> None:
        raise refusal

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    config = load(DEBUG, [override, "run.storage=/tmp/x", "data.root=/tmp/y"])
    with pytest.raises(ConfigError, match=says), run_cluster.cluster(config):
        pass
