"""Folders in open_clip's layout that bring Python files of their own: none of them runs, and nobody is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
from safetensors.torch import save_file
from stored_run import StoredRun, picture

from diki_ray.clip.backbone import load
from diki_ray.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\n"


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A whole backbone in a folder, whose tokenizer is a Python file that writes the marker."""
    pytest.importorskip("transformers", reason="Hugging Face tokenizers need the extra `hf`")
    folder = tmp_path / "clip"
    folder.mkdir()
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1, "hf_tokenizer_name": "theirs"}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": text,
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    plain = {name: value for name, value in text.items() if not name.startswith("hf_")}
    model = open_clip.model.CLIP(16, config["vision_cfg"], plain)
    save_file({n: p.contiguous() for n, p in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    code = HOSTILE.format(marker=str(tmp_path / "MARKER"))
    (folder / "theirs.py").write_text(
        f"{code}from transformers import PreTrainedTokenizerFast\n\nclass Theirs(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": [None, "theirs.Theirs"]}})
    )
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"},
            }
        )
    )
    return folder


def trust(folder: Path, where: str) -> None:
    """Has the folder's own JSON say that its code is to be trusted."""
    path = folder / "open_clip_config.json"
    tree = json.loads(path.read_text())
    section = tree["model_cfg"]["text_cfg"] if where else tree["model_cfg"]
    section[where or "hf"] = {"deeper": [{"trust_remote_code": True}], "trust_remote_code": True}
    path.write_text(json.dumps(tree))


def test_the_attack_on_a_tokenizer_is_one(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(clip_folder, trust_remote_code=True)
    assert (tmp_path / "MARKER").exists()


@pytest.mark.parametrize("where", ["tokenizer_kwargs", "hf_model_config", ""])
def test_a_folder_that_trusts_its_own_code_is_refused(clip_folder: Path, tmp_path: Path, where: str) -> None:
    trust(clip_folder, where)
    with pytest.raises(ConfigError, match="says trust_remote_code, and Python files that a model brings along are nev"):
        load(f"local-dir:{clip_folder}")
    assert not (tmp_path / "MARKER").exists()


def test_a_folders_tokenizer_code_does_not_run_and_nobody_is_asked(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # whoever is asked, and says yes
    with pytest.raises(ConfigError, match=r"Python code of their own \(auto_map\), which is never run"):
        load(f"local-dir:{clip_folder}")
    assert not (tmp_path / "MARKER").exists()


def test_a_folder_that_is_changed_after_it_was_looked_at_runs_nothing(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(clip_folder, "tokenizer_kwargs")
    monkeypatch.setattr("diki_ray.clip.backbone.refuse_trusting", lambda folder: None)
    with pytest.raises(ConfigError, match=r"\(auto_map\), which is never run"):
        load(f"local-dir:{clip_folder}")
    assert not (tmp_path / "MARKER").exists()


def test_a_tokenizer_folder_beside_a_named_model_runs_nothing(clip_folder: Path, tmp_path: Path) -> None:
    from diki_ray.clip.backbone import _tokenizer

    with pytest.raises(ConfigError, match=r"\(auto_map\), which is never run"):
        _tokenizer("ViT-B-16-SigLIP", str(clip_folder))
    assert not (tmp_path / "MARKER").exists()


def test_a_text_towers_code_does_not_run(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    (clip_folder / "theirs.py").write_text(HOSTILE.format(marker=str(tmp_path / "MARKER")) + "class Theirs: pass\n")
    (clip_folder / "config.json").write_text(
        json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs", "AutoModel": "theirs.Theirs"}})
    )
    path = clip_folder / "open_clip_config.json"
    tree = json.loads(path.read_text())
    tree["model_cfg"]["text_cfg"] |= {"hf_model_name": str(clip_folder), "hf_proj_type": "mlp"}
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="never run"):
        load(f"local-dir:{clip_folder}")
    assert not (tmp_path / "MARKER").exists()


def test_a_job_refuses_a_folder_that_trusts_its_own_code(
    clip_folder: Path, tmp_path: Path, job: Callable[..., Any]
) -> None:
    trust(clip_folder, "tokenizer_kwargs")
    run = StoredRun(tmp_path, "warm")
    picture("warm", 1).save(tmp_path / "image.png")
    where = (tmp_path / "image.png", "--storage", run.storage, "--run", "colours")
    done = job("predict", *where, "--backbone", f"local-dir:{clip_folder}")
    assert not (tmp_path / "MARKER").exists()
    assert (done.code, done.stdout) == (2, "")
    assert "says trust_remote_code" in done.stderr
    assert len(done.stderr.splitlines()) == 1
