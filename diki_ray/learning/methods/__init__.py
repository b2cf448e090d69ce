"""What learns a task. `method.name` in the configuration chooses one; everything around it stays the same."""

from diki_ray.learning.methods.base import Method, Step, TrainingBatch
from diki_ray.learning.methods.c_ada import CAda
from diki_ray.learning.methods.classes import Classes
from diki_ray.learning.methods.concat_prompts import ConcatPrompts
from diki_ray.learning.methods.diki import Diki
from diki_ray.learning.methods.dpw import Dpw
from diki_ray.learning.methods.keep_lora import KeepLora
from diki_ray.learning.methods.mahalanobis import Mahalanobis
from diki_ray.learning.methods.mulki import Mulki
from diki_ray.learning.methods.rail import Rail
from diki_ray.learning.methods.residual import ResidualMethod
from diki_ray.learning.methods.sequential_lora import SequentialLora
from diki_ray.learning.methods.snd import Snd
from diki_ray.learning.methods.zero_shot import ZeroShot
from diki_ray.learning.methods.zscl import Zscl

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ZeroShot,
        Diki,
        ConcatPrompts,
        Dpw,
        CAda,
        SequentialLora,
        KeepLora,
        Zscl,
        Snd,
        Mulki,
        Rail,
        Mahalanobis,
        Classes,
    )
}

__all__ = [
    "METHODS",
    "CAda",
    "Classes",
    "ConcatPrompts",
    "Diki",
    "Dpw",
    "Method",
    "ResidualMethod",
    "Step",
    "TrainingBatch",
    "ZeroShot",
]
