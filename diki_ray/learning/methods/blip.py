"""Bit-level information preserving, BLIP (Shi et al., CVPR 2021, arXiv 2105.04444; read with the authors' code).

A weight θ lies in [−b, b], b = 6/√fan_in. n of its bits are frozen, none at first and at most 20: after every step θ
goes no further than b 2⁻ⁿ from where the task before left it, and stays below b (1 − 2⁻²⁰). After task t = 0, 1, …
with F the mean of squared gradients of single images, at labels that are drawn from the model, before θ is rounded:

    n ← n + max(0, ⌈½ log₂( (F + (t + 1) F_old) / ((t + 2) F_old) )⌉)
    θ ← θ rounded to a multiple of b 2⁻ⁿ, and to 0 where n is 0
    F_old ← ((t + 1) F_old + F) / (t + 2),   F_old = F_prior · fan_in before the first task

so a weight that a task told nothing about is free again, and memory does not grow with the tasks. The authors train all
weights by SGD (rates of 0.01 to 0.05, batches of 32 to 64) and choose F_prior for each benchmark, 5e-18 to 1e-15.

Here otherwise: the weights are those of low-rank factors. The random factor A is frozen at its start, as in LoRA-FA
(Zhang et al., 2023, arXiv 2308.03303): were both rounded to 0, no gradient would ever move them again. B, which starts
at 0, is what is quantised; its fan_in is the rank, and b was made for weights that start at random, so for B it is a
choice. F is over all training images once (there 80 batches of 100), and of an image's own loss; there it is of a
hundredth of it, so their F_prior is ten thousand times smaller for the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Method, Step, TrainingBatch
from diki_ray.learning.methods.fisher import squared_gradients
from diki_ray.learning.methods.low_rank import FIXED, keep, kept, trained
from diki_ray.learning.methods.regulariser import Regulariser

MOST_BITS = 20


class Blip(Regulariser):
    def __init__(self, prior: float):
        """prior: F_prior."""
        self.prior = prior

    def begun(self, start: Parameters, predecessor: Parameters | None) -> Parameters:
        ups = {name: p for name, p in start.items() if name.endswith("_up")}
        if predecessor is None:
            fixed = {name: p for name, p in start.items() if name not in ups}
            bits = {name: torch.zeros_like(p) for name, p in ups.items()}
            fisher = {name: torch.full_like(p, self.prior * p.shape[-1]) for name, p in ups.items()}
            num_tasks = torch.zeros(())
        else:
            fixed, bits, fisher = (kept(kind, predecessor) for kind in (FIXED, "bits", "fisher"))
            num_tasks = predecessor["count/tasks"]
        beside = keep(FIXED, fixed) | keep("settled", ups) | keep("bits", bits) | keep("fisher", fisher)
        return ups | beside | {"count/tasks": num_tasks.clone()}

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        bits = kept("bits", parameters)
        for name, settled in kept("settled", parameters).items():
            b = bound(settled)
            room = b * 0.5 ** bits[name]
            moved = torch.minimum(torch.maximum(parameters[name], settled - room), settled + room)
            parameters[name].copy_(moved.clamp(-b * (1 - 0.5**MOST_BITS), b * (1 - 0.5**MOST_BITS)))

    def sums(self, method: Method, parameters: Parameters, batch: TrainingBatch) -> Parameters:
        """Squared gradients, image by image, and the number of images."""
        fixed = kept(FIXED, parameters)
        squares = squared_gradients(method, trained(parameters), fixed, batch, batch.generator())
        return keep("squares", squares) | {"count/images": torch.tensor(len(batch.labels))}

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        num_tasks = parameters["count/tasks"]
        found = keep(FIXED, kept(FIXED, parameters)) | {"count/tasks": num_tasks + 1}
        fisher, bits = kept("fisher", parameters), kept("bits", parameters)
        for name, square in kept("squares", sums).items():
            information = (square / sums["count/images"]).float().to(fisher[name].device)
            together = information + fisher[name] * (num_tasks + 1)
            gained = (0.5 * torch.log2(together / (fisher[name] * (num_tasks + 2)))).ceil().clamp(min=0)
            found[f"bits/{name}"] = (bits[name] + gained).clamp(max=MOST_BITS)
            found[f"fisher/{name}"] = together / (num_tasks + 2)
            found[name] = rounded(parameters[name], found[f"bits/{name}"])
        return found


def bound(up: Tensor) -> float:
    """b of a factor B [D, r]."""
    return 6 / math.sqrt(up.shape[-1])


def rounded(up: Tensor, bits: Tensor) -> Tensor:
    """Each weight as the nearest multiple of b 2⁻ⁿ for its n; 0 where n is 0."""
    b, steps = bound(up), 2.0**bits
    return torch.where(bits > 0, torch.round(up / b * steps) / steps * b, torch.zeros_like(up))
