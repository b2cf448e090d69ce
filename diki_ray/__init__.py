"""diki_ray: continual learning of a frozen CLIP, distributed with Ray.

Data flows one way: configuration -> stream -> trainer -> store -> router -> evaluator -> report.

* `diki_ray.model`: the mathematics (torch and numpy; never imports Ray or our data and runtime layers)
* `diki_ray.data`: data sets, shards, streams (never imports Ray or the runtime layer)
* `diki_ray.runtime`: the store, the trainer and the evaluator on Ray
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from diki_ray.runtime.bundle import Model

__version__ = "0.1.0"


def load(
    path: "str | Path",
    *,
    device: str = "auto",
    backbone: str | None = None,
    pretrained: str | None = None,
    directory: str | None = None,
) -> "Model":
    """The model of a run that jobs/export.py exported: `diki_ray.load(folder).predict(images)`; needs no Ray.

    See diki_ray.runtime.bundle.load_bundle. Imported when it is called, so that `import diki_ray` stays quick.
    """
    from diki_ray.runtime.bundle import load_bundle

    return load_bundle(path, device=device, backbone=backbone, pretrained=pretrained, directory=directory)
