"""The seconds that a training step takes on W devices, from what one device needs and the sizes of the messages.

    t(W) = t_image(B/W) + t_text(C/W) + t_gather(4·(P + 3)·N/W) + t_gather(4·C·E/W) + t_gather(4·C·E·N/W)

B images, C classes, P trainable numbers, E dimensions, N parts of a step, all float32. Each worker gathers what the
parts give and adds it in their order (`diki_ray/learning/collective.py`): the gradients with the losses, the class
features, and the gradients of those. With a ring of links of bandwidth β and latency α, and m bytes from each worker,
t_gather(m) = (W − 1)(α + m/β). Nothing overlaps, and the towers' times are taken to be linear in B/W and C/W, above a
floor that launching their kernels takes.
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
    """t(W) with as many parts as workers, the default; for one worker the measured time itself."""
    w = num_workers

    def gather(num_bytes: float) -> float:
        return (w - 1) * (link.latency_s + num_bytes / link.bytes_per_s)

    image, text = (min(t, max(t / w, step.floor_s)) for t in (step.image_s, step.text_s))
    gradient, features = 4 * (step.num_parameters + 3), 4 * step.num_classes * step.embed_dim
    return image + text + gather(gradient) + gather(features / w) + gather(features)


def speedup(step: Step, link: Link, num_workers: int) -> float:
    """t(1) / t(W)."""
    return step_seconds(step, link, 1) / step_seconds(step, link, num_workers)
