"""diki_ray: continual learning of a frozen CLIP, distributed with Ray.

Data flows one way: configuration -> stream -> trainer -> store -> router -> evaluator -> report. Each room of the house
uses those before it and none after it; Ray is imported from `runs` on:

* `config`: what a run, a method, a sweep and a benchmark are configured by
* `store`: what outlives any process: a run's log, the library of modules, checkpoints
* `clip`: the frozen model and the place beside each of its attentions
* `learning`: how one task's module is learnt
* `answering`: from the features of an image to its answer, and from answers to figures
* `data`: data sets, shards, streams
* `report`: pages, tables and cards of what was computed
* `runs`: a run: its plan and its steps, in one process or on Ray; sweeps
* `prediction`: a stored run in Python, and its answers in batches; `serving`: answers over HTTP
* `commands`: what people type
"""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(
    path: str | Path,
    *,
    device: str = "auto",
    backbone: str | None = None,
    pretrained: str | None = None,
    directory: str | None = None,
) -> Any:
    """The model of a run that `diki-ray export` wrote: `diki_ray.load(folder).predict(images)`; needs no Ray.

    The value is a diki_ray.prediction.bundle.Model, whose module is imported only when this is called, so that
    `import diki_ray` stays quick.
    """
    from diki_ray.prediction.bundle import load_bundle

    return load_bundle(path, device=device, backbone=backbone, pretrained=pretrained, directory=directory)


def __getattr__(name: str) -> Any:
    """`from diki_ray import ContinualModel`: a class whose module is imported only then, for the same reason."""
    if name == "ContinualModel":
        from diki_ray.prediction.continual_model import ContinualModel

        return ContinualModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
