"""Low-rank fine-tuning, task after task: what every method against forgetting is to be read against.

Two families of remedies on top, each in its own file or lines:
* `against_forgetting`: `ewc` (ewc.py), `badam` (badam.py) or `blip` (blip.py) change the training;
* `wise_ft` (Wortsman et al., CVPR 2022, arXiv 2109.01903) changes only the answer: weights (1 − a) θ_0 + a θ, θ_0 the
  pre-trained ones, θ those fine-tuned so far; training goes on from θ. Their commands try a in steps of 0.1, on
  ViT-B/32; that 0.5 is good where nothing is known is the paper's, unverified.

Published for ViT-B/16: rank and learning rate as in low_rank.py; for a stream of tasks there are none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diki_ray.clip.backbone import Backbone
from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.badam import BAdam
from diki_ray.learning.methods.base import Step, TrainingBatch
from diki_ray.learning.methods.blip import Blip
from diki_ray.learning.methods.ewc import Ewc
from diki_ray.learning.methods.low_rank import FIXED, LowRankMethod, kept, trained
from diki_ray.learning.methods.regulariser import Regulariser


class SequentialLora(LowRankMethod):
    name = "sequential_lora"
    version = 1
    summary = "low-rank fine-tuning from task to task (LoRA, Hu et al., ICLR 2022, arXiv 2106.09685)"

    @classmethod
    def described(cls, settings: Mapping[str, Any]) -> str:
        remedy = {
            "ewc": " with elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796)",
            "badam": " with Bayesian adaptive moment regularisation (Foster and Brintrup, 2023, arXiv 2309.08546)",
            "blip": " with bit-level information preserving (Shi et al., CVPR 2021, arXiv 2105.04444)",
        }.get(settings.get("against_forgetting", "none"), "")
        if settings.get("wise_ft", 1.0) < 1:
            remedy += (
                ", interpolated with the pre-trained weights (WiSE-FT, Wortsman et al., CVPR 2022, arXiv 2109.01903)"
            )
        return f"{cls.summary}{remedy}; the latest weights answer every image"

    def __init__(
        self,
        backbone: Backbone,
        against_forgetting: Literal["none", "ewc", "badam", "blip"],
        wise_ft: float,
        ewc_lambda: float,
        badam_std: float,
        blip_prior: float,
        **low_rank: Any,
    ):
        super().__init__(backbone, **low_rank)
        self.wise_ft = wise_ft
        remedies: dict[str, Regulariser] = {
            "none": Regulariser(),
            "ewc": Ewc(ewc_lambda),
            "badam": BAdam(badam_std),
            "blip": Blip(blip_prior),
        }
        self.regulariser = remedies[against_forgetting]

    def initial(self, generator: torch.Generator, predecessor: Parameters | None = None) -> Parameters:
        start = super().initial(generator, predecessor)
        return self.regulariser.begun(start, predecessor)

    def effective(self, parameters: Parameters, step: Step | None = None) -> Parameters:
        factors = trained(parameters) | kept(FIXED, parameters)
        if step is not None:
            return self.regulariser.drawn(factors, parameters, step)
        # B times a is the whole change times a: weights that are interpolated, not features.
        return {name: p * self.wise_ft if name.endswith("_up") else p for name, p in factors.items()}

    def extra_loss(self, parameters: Parameters, step: Step) -> Tensor | None:
        return self.regulariser.penalty(parameters)

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        self.regulariser.after_step(parameters, gradients, step)

    def sums(self, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        return self.regulariser.sums(self, parameters, batch)

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        return trained(parameters) | self.regulariser.finish(parameters, sums)
