"""open_clip imported without timm, transformers and torch's compiler, where a process's only backbone needs none.

Together they take as long to import as torch and the rest of open_clip: half of the time to a first answer. open_clip
goes without the first two where they are not installed, and torchvision wants one function of the third that is called
under torch.compile alone. A process that may meet other backbones imports open_clip as usual.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from diki_ray.config import BackboneSection
from diki_ray.json_text import parsed

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def import_for(backbone: BackboneSection | None) -> None:
    """Imports open_clip as lightly as the only backbone of this process allows; nothing where it is imported already,
    or where the backbone may need all of it (None: it is not known)."""
    imported = {"open_clip", "torchvision"} & sys.modules.keys()
    if not imported and backbone is not None and is_light(backbone):
        with _absent("timm", "transformers"), _without_compiler():
            importlib.import_module("open_clip")


def is_light(backbone: BackboneSection) -> bool:
    """Whether both towers are open_clip's own: the embedded CLIP's, and those of its models whose description names
    neither timm nor Hugging Face."""
    if backbone.name == "embedded":
        return True
    spec = importlib.util.find_spec("open_clip")
    if backbone.directory is not None or Path(backbone.name).name != backbone.name or spec is None or not spec.origin:
        return False
    try:
        model = parsed((Path(spec.origin).parent / "model_configs" / f"{backbone.name}.json").read_bytes())
    except (OSError, ValueError):
        return False
    fields = [key for part in ("vision_cfg", "text_cfg") for key in model.get(part, {})]
    return "multimodal_cfg" not in model and not any(key.startswith(("timm", "hf")) for key in fields)


@contextmanager
def _absent(*names: str) -> Iterator[None]:
    """These packages cannot be imported in the block, as if they were not installed; those that are already, can."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python's word for it
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _without_compiler() -> Iterator[None]:
    """What torchvision imports of torch's compiler stands in for it until it is called."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    package, functions = map(ModuleType, _COMPILER)
    package.__path__ = []

    def is_compile_supported(device: Any) -> Any:
        return importlib.import_module("torch._dynamo.utils").is_compile_supported(device)

    functions.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    sys.modules.update(zip(_COMPILER, (package, functions), strict=True))
    try:
        yield
    finally:
        for name in _COMPILER:
            del sys.modules[name]
