"""The table of docs/backbones.md: every model that open_clip lists, shrunk, put to the test.

python tests/support/backbone_table.py     rewrites the table
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from tiny_families import backbone_of, build, images, plain_features, shrunk, tokens

from diki_ray.clip.backbone import Backbone
from diki_ray.errors import ConfigError
from diki_ray.learning.methods import Diki

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
BEGIN, END = "<!-- table: python tests/support/backbone_table.py -->\n", "<!-- end of table -->"


@dataclass(frozen=True, order=True)
class Family:
    """One row, but for the names of its models."""

    answer: str
    image: str
    text: str
    trimming: str


def examine(model: Any) -> Family:
    """Builds a backbone and runs an untrained and a random module through both towers."""
    image, text = _image_tower(model), _text_tower(model)
    try:
        backbone = backbone_of(model)
    except ConfigError as error:
        found = re.search(r"\(it has (.*?)\)", str(error))
        kind = f"has another kind, `{found[1]}`" if found else "has no attention"
        return Family(f"refused: image tower {kind}", image, text, "–")
    image += f", `{type(backbone.image.attentions[0].module).__name__}`"
    text += f", `{type(backbone.text.attentions[0].module).__name__}`"
    check(backbone)
    return Family("yes", image, text, _trimming(backbone))


def check(backbone: Backbone) -> None:
    """An untrained module changes nothing, a random one does, in both towers; the text side with tokens cut off."""
    method = Diki(backbone, 2, 2, 2, 2)
    untrained = method.initial(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    trained = {name: torch.randn(p.shape, generator=generator) for name, p in untrained.items()}
    for tower, batch, features in (
        ("image", images(), method.image_features),
        ("text", tokens(backbone.model), method.text_features),
    ):
        with torch.no_grad():
            plain = plain_features(backbone.model, batch, tower)
            torch.testing.assert_close(features(batch, untrained), plain, atol=2e-6, rtol=0)
            assert (features(batch, trained) - plain).abs().max() > 1e-4, f"prompts do nothing in the {tower} tower"


def _image_tower(model: Any) -> str:
    visual = model.visual
    return f"timm {type(visual.trunk).__name__}" if hasattr(visual, "trunk") else type(visual).__name__


def _text_tower(model: Any) -> str:
    text = getattr(model, "text", model)
    return type(text.transformer).__name__ if isinstance(text, HFTextEncoder) else "TextTransformer"


def _trimming(backbone: Backbone) -> str:
    if backbone.trimming != "off":
        return {"end of text": "after the end of text", "padding": "in the padding"}[backbone.trimming]
    text: Any = backbone._text
    if text.attn_mask is None:
        return "off: attention is not causal"
    return "off: a class token after the padding is read"


def table(folder: Path) -> str:
    """Markdown; models of one shrunk configuration are examined once."""
    known: dict[str, Family] = {}
    rows: dict[Family, list[str]] = {}
    for name in open_clip.list_models():
        config = shrunk(open_clip.get_model_config(name))
        key = json.dumps(_architecture(config), sort_keys=True)
        if key not in known:
            known[key] = examine(build(config, folder))
        rows.setdefault(known[key], []).append(name)
    lines = [
        "| image tower, its attention | text tower, its attention | works | text trimmed | models of open_clip |",
        "|---|---|---|---|---|",
    ]
    for family, names in sorted(rows.items(), key=lambda row: (row[0].answer != "yes", row[0])):
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (", …" if len(names) > 3 else "")
        cells = (family.image, family.text, family.answer, family.trimming, f"{len(names)}: {shown}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    """What tells shrunk configurations apart: not the tokenizer, and not the size in a timm model's name."""
    key = json.loads(json.dumps(config))
    for unused in ("hf_tokenizer_name", "tokenizer_kwargs"):
        key["text_cfg"].pop(unused, None)
    if (name := key["vision_cfg"].get("timm_model_name")) is not None:
        key["vision_cfg"]["timm_model_name"] = re.sub(
            r"_(patch\d+|\d{3}|tiny|small|base|large|giantopt|so400m)\b", "", name
        )
    return key


if __name__ == "__main__":
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    with tempfile.TemporaryDirectory() as temporary:
        PAGE.write_text(before + BEGIN + table(Path(temporary)) + END + rest.split(END)[1])
