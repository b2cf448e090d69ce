"""Bayesian adaptive moment regularisation (Foster and Brintrup, 2023, arXiv 2309.08546).

Every weight is a Gaussian with mean μ and deviation σ, and each step sees a draw θ = μ + σ ε. With g the gradient at θ,
summed over the batch's images, m and v its moments as Adam has them:

    μ ← μ − η σ² m̂ / (√v̂ + 1e-10)
    σ ← σ √(1 + (½ σ g ε)²) − ½ σ² g ε

A weight that matters gets a small σ and hardly moves in later tasks; no task boundaries are needed for it. Answers are
given at μ. The update of σ is Bayesian gradient descent's (Zeno et al., 2018, arXiv 1803.10123). The equations are
those of a public implementation of the optimiser; it averages 10 draws a step, here it is one. `train.lr` is η; what
the run's own optimiser does to the factors is replaced. The moments start anew with each task. unverified: the paper's
own text, its η and its first σ. There are no published values for ViT-B/16.
"""

from __future__ import annotations

import math

import torch

from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Step
from diki_ray.learning.methods.low_rank import keep, kept
from diki_ray.learning.methods.regulariser import Regulariser

BETAS = (0.9, 0.999)
EPS = 1e-10


class BAdam(Regulariser):
    def __init__(self, std: float):
        """std: σ before the first task."""
        self.std = std

    def kept(self, start: Parameters, predecessor: Parameters | None) -> Parameters:
        zeros = {name: torch.zeros_like(p) for name, p in start.items()}
        first = {name: torch.full_like(p, self.std) for name, p in start.items()}
        sigma = first if predecessor is None else kept("sigma", predecessor)
        return keep("mean", start) | keep("sigma", sigma) | keep("m", zeros) | keep("v", zeros)

    def drawn(self, factors: Parameters, parameters: Parameters, step: Step) -> Parameters:
        sigma, noise = kept("sigma", parameters), _noise(factors, step)
        return {name: p + sigma[name] * noise[name] for name, p in factors.items()}

    def after_step(self, parameters: Parameters, gradients: Parameters, step: Step) -> None:
        mean, sigma, m, v = (kept(kind, parameters) for kind in ("mean", "sigma", "m", "v"))
        noise = _noise({name: p for name, p in parameters.items() if name in mean}, step)
        t = step.number + 1
        corrected = step.lr * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        for name, gradient in gradients.items():
            g, s = gradient * step.num_samples, sigma[name]
            m[name].lerp_(g, 1 - BETAS[0])
            v[name].lerp_(g**2, 1 - BETAS[1])
            mean[name].sub_(corrected * s**2 * m[name] / (v[name].sqrt() + EPS))
            pull = s * g * noise[name] / 2
            s.copy_(s * ((1 + pull**2).sqrt() - pull))
            parameters[name].copy_(mean[name])

    def finish(self, parameters: Parameters, sums: Parameters) -> Parameters:
        return keep("sigma", kept("sigma", parameters))


def _noise(factors: Parameters, step: Step) -> Parameters:
    """ε of a step, the same on every rank and whenever it is asked for."""
    generator = step.generator()
    return {n: torch.randn(factors[n].shape, generator=generator).to(factors[n].device) for n in sorted(factors)}
