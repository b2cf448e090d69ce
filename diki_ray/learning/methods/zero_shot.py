"""Nothing is trained: the frozen CLIP answers (Radford et al., ICML 2021, arXiv 2103.00020). No hyperparameters.

Its row is what every other method is to be read against; its modules hold the statistics of the tasks alone.
"""

from __future__ import annotations

from diki_ray.learning.methods.base import UntrainedMethod


class ZeroShot(UntrainedMethod):
    name = "zero_shot"
    version = 1
    summary = (
        "zero-shot classification (Radford et al., ICML 2021, arXiv 2103.00020): nothing is trained, the pre-trained "
        "model answers"
    )
    answering = "frozen"
