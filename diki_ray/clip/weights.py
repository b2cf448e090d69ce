"""Whether the weights of a backbone are on this machine, without loading or fetching anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from diki_ray.clip.backbone import LOCAL
from diki_ray.clip.light_import import open_clip
from diki_ray.config import BackboneSection
from diki_ray.errors import ConfigError

_OF_OPENAI = Path.home() / ".cache" / "clip"
"""Where open_clip keeps what it fetches from a plain URL."""
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def weights_file(backbone: BackboneSection) -> Path | None:
    """The file that the backbone is loaded from, or None where open_clip would fetch the weights first.

    Raises:
        ConfigError: no such model or tag.
    """
    name, pretrained = backbone.name, backbone.pretrained
    if name == "embedded":
        return Path(__file__).parent.parent / "assets" / "tiny_clip" / "model.safetensors"
    if name.endswith(".py"):
        return _existing(Path(name).expanduser())
    if name.startswith(LOCAL):
        return _existing(Path(name.removeprefix(LOCAL)).expanduser() / "open_clip_config.json")
    if pretrained is not None and Path(pretrained).is_file():
        return Path(pretrained)
    source: dict[str, Any] = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if not source:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none, for there is no such model"
        raise ConfigError(f"backbone.pretrained: {name!r} has no weights {pretrained!r}; open_clip knows {tags}.")
    if repository := source.get("hf_hub"):
        place, _, file = repository.rpartition("/")
        return next(filter(None, (_cached(place, f) for f in ((file,) if file else _HUB_FILES))), None)
    return _existing(_OF_OPENAI / source["url"].rpartition("/")[2])


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _cached(repository: str, file: str) -> Path | None:
    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None
