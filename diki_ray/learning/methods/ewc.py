"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796).

    L(θ) = CE(θ) + λ/2 Σ_i F_i (θ_i − θ*_i)²

θ* is where the task before ended. F_i, the diagonal of the Fisher information, is the mean over a task's training
images of (∂ log p(y | image) / ∂θ_i)², at the label y. The paper has a penalty for each earlier task; here their F are
summed and only the last θ* is kept, as Huszár (PNAS 2018, arXiv 1712.03847) derives it. λ depends on the problem; there
are no published values for ViT-B/16. unverified: the text of both papers could not be opened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Method, TrainingBatch
from diki_ray.learning.methods.fisher import squared_gradients
from diki_ray.learning.methods.low_rank import keep, kept, trained
from diki_ray.learning.methods.regulariser import Regulariser


class Ewc(Regulariser):
    def __init__(self, strength: float):
        """strength: λ."""
        self.strength = strength

    def kept(self, start: Parameters, predecessor: Parameters | None) -> Parameters:
        if predecessor is None:
            return {}
        return keep("anchor", start) | keep("fisher", kept("fisher", predecessor))

    def penalty(self, parameters: Parameters) -> Tensor | None:
        anchors, fisher = kept("anchor", parameters), kept("fisher", parameters)
        if not fisher:
            return None
        terms = [(f * (parameters[n] - anchors[n]) ** 2).sum() for n, f in fisher.items()]
        return self.strength / 2 * torch.stack(terms).sum()

    def sums(self, method: Method, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        """Squared gradients, image by image, and the number of images."""
        squares = squared_gradients(method, trained(parameters), {}, batch)
        return keep("squares", squares) | {"count/images": torch.tensor(len(batch.labels))}

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        earlier = kept("fisher", parameters)
        return {
            f"fisher/{name}": earlier.get(name, 0) + (square / sums["count/images"]).float().to(parameters[name].device)
            for name, square in kept("squares", sums).items()
        }
