"""Attacks: a run, a tar, a bundle or a folder of somebody else's names code of theirs, and none of it may run.

Each attack's code writes a marker file when it runs.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stored_run import StoredRun, picture

import diki_ray
from diki_ray.config import BackboneSection
from diki_ray.errors import ConfigError, UserError
from diki_ray.learning.module import read_tensors, write_tensors
from diki_ray.prediction.bundle import export_bundle
from diki_ray.prediction.run_predictor import load_predictor
from diki_ray.report import results
from diki_ray.report import run as report
from diki_ray.report.model_card import load_arguments
from diki_ray.report.next_steps import next_steps
from diki_ray.runs.stored_run import config_of
from diki_ray.runs.train import group
from diki_ray.serving.settings import Settings
from diki_ray.serving.snapshot import Snapshots
from diki_ray.store import run_store, upkeep
from diki_ray.store.run_store import RunStore

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\n"


class Stranger:
    """A run in a storage, by a stranger, and the marker that their code writes where it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marker = folder, folder / "MARKER"
        self.run = StoredRun(folder, "warm")
        self.run.store.release(self.run.epoch)
        self.storage = self.run.storage
        self.harmless = self.run.config.backbone.name
        self.code = folder / "their backbone.py"
        self.code.write_text(HOSTILE.format(marker=str(self.marker)) + Path(self.harmless).read_text())
        self.image = folder / "image.png"
        picture("warm", 1).save(self.image)
        self.names({"name": str(self.code)})

    def names(self, backbone: dict[str, Any]) -> None:
        """Puts another backbone into the stored configuration."""
        path = Path(self.storage, "runs/colours/results/config.yaml")
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"backbone": backbone}))

    @property
    def ran(self) -> bool:
        return self.marker.exists()


@pytest.fixture
def stranger(tmp_path: Path) -> Stranger:
    return Stranger(tmp_path)


def arguments_of(name: str, stranger: Stranger, storage: object, run: str = "colours") -> tuple[object, ...]:
    return {
        "predict": (stranger.image, "--storage", storage, "--run", run),
        "predict --output": (
            stranger.image,
            "--storage",
            storage,
            "--run",
            run,
            "--output",
            stranger.folder / "a.jsonl",
        ),
        "export": (stranger.folder / "bundle", "--storage", storage, "--run", run),
        "evaluate": ("--storage", storage, "--run", run),
        "serve": ("--storage", storage, "--run", run, "--no-token"),
    }[name]


JOBS = ["predict", "predict --output", "export", "evaluate", "serve"]


@pytest.mark.parametrize("name", JOBS)
def test_no_job_runs_the_file_that_a_stored_configuration_names(
    stranger: Stranger, name: str, job: Callable[..., Any]
) -> None:
    done = job(name.split()[0], *arguments_of(name, stranger, stranger.storage))
    assert not stranger.ran
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: the stored configuration of run 'colours' names the Python file '{stranger.code}' as its backbone, "
        f"and stored data runs no code and chooses no folder here: say --backbone '{stranger.code}' if you trust it.\n"
    )


def test_no_job_runs_the_file_that_an_imported_tar_names(stranger: Stranger, job: Callable[..., Any]) -> None:
    tar, home = stranger.folder / "run.tar", stranger.folder / "home"
    RunStore.open(stranger.storage, "colours").export(str(tar))
    assert job("store", "import", home, "mine", tar).code == 0
    done = job("predict", *arguments_of("predict", stranger, home, "mine"))
    assert not stranger.ran
    assert (done.code, done.stdout) == (2, "")
    assert "names the Python file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_replica_runs_the_file_that_a_stored_configuration_names(stranger: Stranger) -> None:
    with pytest.raises(ConfigError, match="names the Python file"):
        Snapshots(Settings(storage=stranger.storage, run="colours"))
    assert not stranger.ran


def hostile_bundle(stranger: Stranger) -> Path:
    """A bundle whose digests all hold, and whose configuration names their file."""
    folder = stranger.folder / "bundle"
    told = config_of(stranger.run.store, backbone=BackboneSection(name=stranger.harmless))
    export_bundle(stranger.storage, "colours", str(folder), told)
    content, tensors = read_tensors((folder / "bundle.safetensors").read_bytes())
    content["config"]["backbone"]["name"] = str(stranger.code)
    (folder / "bundle.safetensors").write_bytes(write_tensors(content, tensors))
    return folder


def test_loading_a_bundle_does_not_run_the_file_that_it_names(stranger: Stranger) -> None:
    folder = hostile_bundle(stranger)
    with pytest.raises(ConfigError) as refused:
        diki_ray.load(folder)
    assert not stranger.ran
    assert str(refused.value) == (
        f"the bundle {folder}/bundle.safetensors names the Python file '{stranger.code}' as its backbone, and stored "
        f'data runs no code and chooses no folder here: say backbone="{stranger.code}" if you trust it.'
    )


@pytest.mark.parametrize(
    ("backbone", "what", "say"),
    [
        ({"name": "local-dir:{}"}, "the folder {} as its backbone", "--backbone local-dir:{}"),
        (
            {"name": "ViT-B-16-SigLIP", "pretrained": "webli", "directory": "{}"},
            "the folder {} beside its backbone",
            "--backbone ViT-B-16-SigLIP --pretrained webli --directory {}",
        ),
        ({"name": "embedded", "directory": "{}"}, "the folder {} beside its backbone", "--backbone embedded"),
        (
            {"name": "hf-hub:someone/theirs"},
            "hf-hub:someone/theirs as its backbone, which is no model",
            "--backbone hf",
        ),
        ({"name": "x.PY"}, "x.PY as its backbone, which is no model of open_clip's", "--backbone x.PY"),
        (
            {"name": "\u001b[2J\n.py"},
            "the Python file '\\x1b[2J\\n.py' as its backbone",
            "--backbone $'\\x1b[2J\\n.py'",
        ),
        ({"name": "$(touch x).py"}, "the Python file '$(touch x).py' as its backbone", "--backbone '$(touch x).py'"),
    ],
)
def test_stored_data_chooses_no_folder_and_no_hub_page(
    stranger: Stranger, backbone: dict[str, str], what: str, say: str
) -> None:
    folder = str(stranger.folder)
    stranger.names({field: value.replace("{}", folder) for field, value in backbone.items()})
    with pytest.raises(ConfigError) as refused:
        load_predictor(stranger.storage, "colours")
    assert f"names {what.replace('{}', folder)}" in str(refused.value)
    assert f"say {say.replace('{}', folder)}" in str(refused.value)
    assert str(refused.value).isprintable()


def test_weights_that_a_stored_configuration_names_are_read_as_tensors(stranger: Stranger) -> None:
    class Writes:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.write_text, (stranger.marker, "ran")

    weights = stranger.folder / "weights.pt"
    torch.save({"state_dict": Writes()}, weights)
    stranger.names({"name": "ViT-S-32-alt", "pretrained": str(weights)})
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_predictor(stranger.storage, "colours")
    assert not stranger.ran
    torch.load(weights, weights_only=False)
    assert stranger.ran  # the attack is one


def test_a_stored_configuration_names_no_cluster_to_join(stranger: Stranger) -> None:
    stranger.names({"name": "embedded"})
    path = Path(stranger.storage, "runs/colours/results/config.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"cluster": {"address": "ray://theirs:10001"}}))
    assert config_of(stranger.run.store).cluster.address is None


# The caller's own word


@pytest.mark.parametrize("option", ["--backbone", "--config"])
def test_the_callers_word_is_taken(stranger: Stranger, option: str, job: Callable[..., Any]) -> None:
    """The stored file stays unrun: theirs is not the one that is named."""
    configuration = stranger.folder / "mine.yaml"
    configuration.write_text(stranger.run.config.to_yaml())
    word = stranger.harmless if option == "--backbone" else configuration
    where = arguments_of("predict", stranger, stranger.storage)
    done = job("predict", *where, option, word, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)[0]["task"] == "warm"
    assert job("export", *arguments_of("export", stranger, stranger.storage), option, word).code == 0
    with pytest.raises(ConfigError, match="say backbone="):
        diki_ray.load(stranger.folder / "bundle")
    assert diki_ray.load(stranger.folder / "bundle", backbone=stranger.harmless).tasks == ("warm",)
    assert not stranger.ran


def test_what_the_sentence_says_to_type_runs_the_named_file(stranger: Stranger) -> None:
    settings = Settings(storage=stranger.storage, run="colours", backbone=str(stranger.code))
    assert Snapshots(settings).current.tasks == ("warm",)
    assert stranger.ran
    stranger.marker.unlink()
    assert diki_ray.load(hostile_bundle(stranger), backbone=str(stranger.code)).tasks == ("warm",)
    assert stranger.ran


def test_a_folder_beside_a_trusted_file_is_not_taken_from_stored_data(stranger: Stranger) -> None:
    stranger.names({"name": stranger.harmless, "directory": "/theirs"})
    told = config_of(stranger.run.store, backbone=BackboneSection(name=stranger.harmless))
    assert told.backbone.directory is None


def test_weights_of_no_backbone_are_refused(stranger: Stranger, job: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="give backbone too"):
        diki_ray.load(hostile_bundle(stranger), pretrained="openai")
    done = job("predict", *arguments_of("predict", stranger, stranger.storage), "--directory", "/tmp")
    assert done.code == 2
    assert "give backbone too" in done.stderr


def test_what_is_said_at_a_runs_end_names_its_file(stranger: Stranger) -> None:
    config = stranger.run.config
    steps = next_steps(config, "…", None)
    assert f" predict IMAGE --storage {config.run.storage} --run colours --backbone {stranger.harmless}" in steps
    word = load_arguments(config.backbone)
    export_bundle(stranger.storage, "colours", str(stranger.folder / "bundle"), config)
    assert f'diki_ray.load("this/folder", {word})' in (stranger.folder / "bundle/README.md").read_text()


# Imports


def with_file(stranger: Stranger, name: str, data: bytes) -> Path:
    """An exported run with one more file in it."""
    tar = stranger.folder / "run.tar"
    RunStore.open(stranger.storage, "colours").export(str(tar))
    member = tarfile.TarInfo(name)
    member.size = len(data)
    with tarfile.open(tar, "a") as archive:
        archive.addfile(member, io.BytesIO(data))
    return tar


@pytest.mark.parametrize("name", ["results/theirs.py", "results/x/results.json", "sitecustomize.py", "log/evil.pkl"])
def test_an_import_takes_known_files_only(stranger: Stranger, name: str, job: Callable[..., Any]) -> None:
    tar = with_file(stranger, f"./runs/colours/{name}", b"print()")
    done = job("store", "import", tar, "--storage", stranger.folder / "home", "--run", "mine")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tar} is refused: no run writes '{name}'")
    assert not (stranger.folder / "home" / "runs").exists()
    shutil.unpack_archive(tar, stranger.folder / "folder")
    with pytest.raises(UserError, match="no run writes"):
        RunStore.import_(str(stranger.folder / "home"), "colours", str(stranger.folder / "folder"))


def test_a_page_from_elsewhere_is_not_taken(stranger: Stranger, job: Callable[..., Any]) -> None:
    tar = with_file(stranger, "./runs/colours/results/report.html", b"<script>theirs()</script>")
    done = job("store", "import", tar, "--storage", stranger.folder / "home", "--run", "mine")
    assert done.code == 0, done.stderr
    taken = {path.name for path in (stranger.folder / "home/runs/mine/results").iterdir()}
    assert taken == {"config.yaml", "results.json"}
    assert " report --storage" in done.stdout


@pytest.mark.parametrize(
    "name", [results.DOCUMENT, run_store.CONFIG_DOCUMENT, report.REPORT, group.FAILURE], ids=lambda name: name
)
def test_every_document_that_a_job_writes_is_known_to_imports(name: str) -> None:
    assert upkeep._TAKEN.fullmatch(f"results/{name}")
