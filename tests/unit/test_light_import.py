"""A process that needs the embedded CLIP or a model of open_clip's own towers starts without what it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diki_ray.clip.backbone import load
from diki_ray.clip.light_import import is_light
from diki_ray.config import BackboneSection

LIGHT = """
import sys
from diki_ray.clip.light_import import import_for
from diki_ray.config import BackboneSection
assert "torch" not in sys.modules
import_for(BackboneSection(name="embedded"))
from diki_ray.clip.backbone import load
print(load("embedded").digest())
print(sorted({"timm", "transformers", "torch._dynamo", "sympy"} & set(sys.modules)))
import timm, torch._dynamo
from torchvision.ops import roi_align
assert torch._dynamo.is_compiling is not None and timm.create_model
"""


def test_the_embedded_clip_is_the_same_without_what_it_does_not_need_which_can_be_imported_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [load("embedded").digest(), "[]"]


@pytest.mark.parametrize(
    ("name", "light"),
    [
        ("embedded", True),
        ("ViT-B-16", True),
        ("ViT-B-16-SigLIP", False),
        ("EVA02-B-16", False),
        ("roberta-ViT-B-32", False),
        ("coca_ViT-B-32", False),
        ("mine.py", False),
        ("local-dir:folder", False),
        ("../ViT-B-16", False),
        ("no such model", False),
    ],
)
def test_which_backbones_need_more(name: str, light: bool) -> None:
    assert is_light(BackboneSection(name=name)) == light


def test_a_folder_of_tokenizer_files_needs_more() -> None:
    assert not is_light(BackboneSection(name="ViT-B-16", directory="tokenizer"))
