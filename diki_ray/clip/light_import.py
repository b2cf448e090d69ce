"""open_clip, imported without what few backbones need: timm, transformers and torch's compiler.

Together they take as long to import as torch and the rest of open_clip, in every process of a cluster. open_clip does
without the first two where they are not installed, and torchvision wants one function of the third, which is called
under torch.compile alone. A backbone that needs them asks for them when it is loaded (`import_whole`).

Only processes of ours start so: a command says it in its environment, and the workers of the cluster that it starts
have the same. Where this package is imported by somebody's own program, open_clip is whole from the beginning.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

VARIABLE = "DIKI_LIGHT_IMPORT"
"""1 in the environment of a process that may start so."""
_LEFT_OUT = ("timm", "transformers")
_USERS = ("open_clip.hf_model", "open_clip.timm_model", "open_clip.coca_model")
"""What binds them, or says that they are not there, when it is imported."""
_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


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
        from torch._dynamo.utils import is_compile_supported as compiler_says

        return compiler_says(device)

    functions.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    sys.modules.update(zip(_COMPILER, (package, functions), strict=True))
    try:
        yield
    finally:
        for name in _COMPILER:
            del sys.modules[name]


_light = os.environ.get(VARIABLE) == "1" and "open_clip" not in sys.modules
with ExitStack() as _without:
    if _light:
        _without.enter_context(_absent(*_LEFT_OUT))
        _without.enter_context(_without_compiler())
    import open_clip


def import_whole() -> None:
    """Gives open_clip timm and transformers, where they are installed, as if it had been imported with them."""
    global _light
    if _light:
        for name in _USERS:
            importlib.reload(sys.modules[name])  # classes that are bound elsewhere read the same, renewed globals
        _light = False


def needs_whole(name: str) -> bool:
    """Whether one of the towers of this model of open_clip's is timm's or Hugging Face's, or it writes captions."""
    model = open_clip.get_model_config(name) or {}
    fields = [field for part in ("vision_cfg", "text_cfg") for field in model.get(part, {})]
    return "multimodal_cfg" in model or any(field.startswith(("timm", "hf")) for field in fields)


__all__ = ["import_whole", "needs_whole", "open_clip"]
