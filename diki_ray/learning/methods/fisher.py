"""The diagonal of the Fisher information, from single images: what EWC and BLIP measure importance by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.residual import Parameters
from diki_ray.learning.methods.base import Method, TrainingBatch


def squared_gradients(
    method: Method,
    factors: Parameters,
    others: Parameters,
    batch: TrainingBatch,
    generator: torch.Generator | None = None,
) -> Parameters:
    """Σ (∂ log p(y | image) / ∂θ)² over the images of a batch, for each tensor θ in `factors`.

    others: tensors that features need beside the factors. y is the image's own label (the empirical Fisher
    information); with a generator on the CPU it is drawn from the model's answer, as the information itself is defined.
    """
    own = {name: p.detach().requires_grad_() for name, p in factors.items()}
    squares = {name: torch.zeros_like(p) for name, p in own.items()}
    with torch.enable_grad():
        texts = method.text_features(batch.class_tokens, own | others)
        for image, label in zip(batch.images.split(1), batch.labels.split(1), strict=True):
            logits = method.backbone.logits(method.image_features(image, own | others), texts)
            if generator is not None:
                label = _drawn(logits, generator)
            loss = F.cross_entropy(logits, label.to(logits.device))
            gradients = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
            for square, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    square += gradient**2
    return squares


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)[0]
