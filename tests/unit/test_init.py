"""`diki-ray init`: a configuration from folders, which is valid, says what was found and overwrites nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diki_ray.clip.weights import weights_file
from diki_ray.commands.app import run
from diki_ray.commands.init import configuration
from diki_ray.config import BackboneSection, Config, load
from diki_ray.data.proposal import Proposal, data_sets_in, proposed
from diki_ray.errors import ConfigError, DataError


def put_images(folder: Path, classes: tuple[str, ...], number: int = 4) -> Path:
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.random.default_rng(100 * c + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_it_writes_a_configuration_that_can_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put_images(Path("wild birds"), ("red_kite", "barnOwl"))
    put_images(Path("digits/train"), ("0", "1"))
    put_images(Path("digits/test"), ("0", "1"))
    assert run(None, ["init", "wild birds", "digits"]) == 0
    said = capsys.readouterr().out
    assert "wild_birds: 2 classes (barn Owl, red kite)" in said
    assert "continual --config wild_birds-digits.yaml --plan" in said
    config = load("wild_birds-digits.yaml")
    assert [(t.data, t.name, t.template) for t in config.tasks] == [
        (str(tmp_path / "wild birds"), "wild_birds", "a photo of a {}, a type of bird."),
        (str(tmp_path / "digits"), "digits", 'a photo of the number: "{}".'),
    ]
    assert (config.run.name, config.method.name, config.backbone.name) == ("wild_birds-digits", "diki", "embedded")
    text = Path("wild_birds-digits.yaml").read_text()
    assert "# images: 4 train, 2 val, 2 test (class folders)" in text
    assert "# images: 6 train, 2 val, 8 test (class folders in split folders)" in text
    assert "time on this machine: about" in text
    assert not Path("prepared").exists()
    assert not Path("storage").exists()
    assert run(None, ["init", "digits", "--output", "wild_birds-digits.yaml"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert Path("wild_birds-digits.yaml").read_text() == text
    assert run(None, ["continual", "--config", "wild_birds-digits.yaml", "--plan"]) == 0
    assert "modules to learn: 2" in capsys.readouterr().out


def test_a_folder_of_data_sets_is_each_of_them(tmp_path: Path) -> None:
    put_images(tmp_path / "all" / "a" / "train", ("x", "y"))
    put_images(tmp_path / "all" / "b", ("x", "y"))
    (tmp_path / "all" / "README.txt").touch()
    assert data_sets_in(str(tmp_path / "all")) == [str(tmp_path / "all" / name) for name in "ab"]
    assert data_sets_in(str(tmp_path / "all" / "a")) == [str(tmp_path / "all" / "a")]
    assert data_sets_in(str(tmp_path / "all" / "b")) == [str(tmp_path / "all" / "b")]
    assert data_sets_in("embedded:gems") == ["embedded:gems"]


def test_what_is_no_data_set_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        with pytest.raises(DataError):
            proposed(str(tmp_path / folder))
        assert run(None, ["init", str(tmp_path / folder), "--output", str(tmp_path / "c.yaml")]) == 2
    put_images(tmp_path / "x" / "same", ("a", "b"))
    put_images(tmp_path / "y" / "same", ("a", "b"))
    folders = [str(tmp_path / name / "same") for name in "xy"]
    assert run(None, ["init", *folders, "--output", str(tmp_path / "c.yaml")]) == 2
    assert "would all be the task 'same'" in capsys.readouterr().err
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize("odd", ["a: b", "#x", "'", '"', "{}", "yes", "1", "\\", "[", "é\u2028", "- a", "  "])
def test_names_of_folders_are_written_as_they_are(odd: str, tmp_path: Path) -> None:
    task = Proposal(f"/data/{odd}", "t", f"{odd} {{}}".replace("{} ", ""), (odd, "b"), {"train": 1}, "x", (odd,))
    text = configuration([task], "r", odd, BackboneSection(), f"{odd}because")
    (tmp_path / "c.yaml").write_text(text)
    config = load(tmp_path / "c.yaml")
    assert isinstance(config, Config)
    assert (config.tasks[0].data, config.run.storage) == (task.data, odd)
    assert config.tasks[0].template == task.template


@pytest.mark.parametrize(
    ("backbone", "gpus", "method"), [("embedded", 0, "diki"), ("ViT-B-16", 0, "classes"), ("ViT-B-16", 4, "diki")]
)
def test_prompts_are_trained_where_that_takes_minutes_and_the_other_way_is_a_comment_that_works(
    backbone: str, gpus: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    task = Proposal("/data/a", "a", "{}", ("x", "y"), {"train": 2}, "class folders", ())
    text = configuration([task], "r", None, BackboneSection(name=backbone), "because")
    (tmp_path / "c.yaml").write_text(text)
    config = load(tmp_path / "c.yaml")
    assert (config.method.name, config.routing.density, config.class_model.beside_modules > 0) == (
        method,
        "classes",
        True,
    )
    fields = ("method:", "train:")
    lines = [line for line in text.splitlines() if not line.startswith(fields)]
    (tmp_path / "other.yaml").write_text(
        "\n".join(x[2:] if x.startswith(tuple(f"# {f}" for f in fields)) else x for x in lines)
    )
    other = load(tmp_path / "other.yaml")
    assert {config.method.name, other.method.name} == {"diki", "classes"}
    assert config.train.num_workers == other.train.num_workers == (gpus or config.evaluate.num_workers)


def test_whether_weights_are_here_is_known_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights_file(BackboneSection()) is not None
    (tmp_path / "w.pt").touch()
    assert weights_file(BackboneSection(name="ViT-B-16", pretrained=str(tmp_path / "w.pt"))) == tmp_path / "w.pt"
    assert weights_file(BackboneSection(name=str(tmp_path / "none.py"))) is None
    assert weights_file(BackboneSection(name=f"local-dir:{tmp_path}")) is None
    with pytest.raises(ConfigError, match="has no weights 'opnai'; open_clip knows openai"):
        weights_file(BackboneSection(name="ViT-B-16", pretrained="opnai"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    openai = BackboneSection(name="ViT-B-16", pretrained="openai")
    assert weights_file(openai) is None
    snapshot = tmp_path / "hub" / "models--timm--vit_base_patch16_clip_224.openai"
    (snapshot / "snapshots" / "abc").mkdir(parents=True)
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("abc")
    file = snapshot / "snapshots" / "abc" / "open_clip_model.safetensors"
    file.touch()
    assert weights_file(openai) == file
