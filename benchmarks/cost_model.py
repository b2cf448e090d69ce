"""The seconds that a training step takes on W devices, from what one device needs and the sizes of the messages.

    t(W) = t_image(B/W) + t_text(C/W) + t_sum(4·(P + 3)) + t_gather(4·C·E) + t_sum(4·C·E)

B images, C classes, P trainable numbers, E dimensions, all float32. The gradient with the losses is one summing
all-reduce; class features are gathered forward, and their gradients summed backward. With a ring of links of
bandwidth β and latency α: t_sum(m) = 2(W − 1)(α + m/(W·β)), t_gather(m) = (W − 1)(α + m/(W·β)). Nothing overlaps, and
the towers' times are taken to be linear in B/W and C/W, above a floor that launching their kernels takes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Between neighbours of a ring."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Step:
    """One training step as measured on one device."""

    image_s: float
    """Forward and backward of the image tower, the whole batch."""
    text_s: float
    """Likewise of the text tower, all classes."""
    num_classes: int
    num_parameters: int = 163_840
    embed_dim: int = 512
    floor_s: float = 0.0
    """The least that a tower's pass takes, however few its rows."""


def step_seconds(step: Step, link: Link, num_workers: int) -> float:
    """t(W); for one worker the measured time itself."""
    w = num_workers

    def ring(num_bytes: float) -> float:
        return (w - 1) * (link.latency_s + num_bytes / (w * link.bytes_per_s))

    image, text = (min(t, max(t / w, step.floor_s)) for t in (step.image_s, step.text_s))
    gradient, features = 4 * (step.num_parameters + 3), 4 * step.num_classes * step.embed_dim
    return image + text + 2 * ring(gradient) + ring(features) + 2 * ring(features)


def speedup(step: Step, link: Link, num_workers: int) -> float:
    """t(1) / t(W)."""
    return step_seconds(step, link, 1) / step_seconds(step, link, num_workers)
