"""A process starts without what open_clip needs for few backbones, and gets it when it loads one of those."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from diki_ray.clip.backbone import load
from diki_ray.clip.light_import import VARIABLE, needs_whole

LIGHT = """
import sys
from diki_ray.clip.backbone import load
from diki_ray.clip.light_import import import_whole, open_clip
print(load("embedded").digest())
print(sorted({"timm", "transformers", "torch._dynamo", "sympy"} & set(sys.modules)))
try:
    open_clip.create_model("ViT-B-16-SigLIP", pretrained=None)
except (RuntimeError, AssertionError, TypeError, AttributeError):
    print("refused")
import_whole()
model = open_clip.create_model("EVA02-B-16", pretrained=None)
print(type(model.visual.trunk).__module__, type(model.visual) is open_clip.model.TimmModel)
import torch._dynamo
from torchvision.ops.roi_align import is_compile_supported
print(is_compile_supported("cpu"), torch._dynamo.is_compiling())
"""


def test_the_embedded_clip_is_the_same_without_what_it_does_not_need_which_comes_when_it_is_needed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=240, env=os.environ | {VARIABLE: "1"}
    )
    assert done.returncode == 0, done.stderr
    expected = [load("embedded").digest(), "[]", "refused", "timm.models.eva True", "True False"]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("ViT-B-16", False),
        ("ViT-B-16-SigLIP", True),
        ("EVA02-B-16", True),
        ("roberta-ViT-B-32", True),
        ("coca_ViT-B-32", True),
    ],
)
def test_which_backbones_need_more(name: str, whole: bool) -> None:
    assert needs_whole(name) == whole
