"""The gradient of a step in parts: the same bits for any number of workers.

A global batch is cut into P parts, the classes into P shares. A worker computes its parts one after the other, each
with the tensor shapes that it would have alone, and what the parts give is added in their order on every worker
(learning/collective.py). For each part:

    text features of its classes ── gathered ──▶ loss of its images among all classes
    gradients of its images' loss: of the parameters, and of all text features ── summed over parts ──▶ back through
    the text features of its own classes

A method's loss over rows that parts share (`Method.shared_rows`) goes the way of the text features. Graphs end where
something is gathered, so backward passes hold no collective, and a part's image graph is freed before the next one's.

Shapes: C classes, E embedding dimensions, b images of a part, n numbers trained, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from diki_ray.clip.residual import Parameters
from diki_ray.learning.collective import all_reduce_sum, gather_rows, own_parts, share, sum_of_parts
from diki_ray.learning.methods.base import AddedLoss, Method, OwnImages, Step

Gradients = Sequence[Tensor | None]


class StepInParts:
    """One step's computation on one worker.

    parameters: those that are trained; kept: the method's other tensors; step: of part 0.
    """

    def __init__(self, method: Method, class_tokens: Tensor, parameters: Parameters, kept: Parameters, step: Step):
        self.method, self.class_tokens = method, class_tokens
        self.trained = list(parameters.values())
        self.parameters = parameters | kept
        self.num_parts = step.num_parts
        self.steps = [replace(step, part=part) for part in own_parts(step.num_parts)]

    def sums(self, batch: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """[n + 3], over all parts: the flat gradient of the loss, summed over images, then that loss, the number of
        right answers and the number of images; equal on every worker.

        batch: images [b, 3, H, W] and labels [b] of each of this worker's parts; b may be 0.
        """
        with torch.enable_grad():
            texts = [class_features(self.method, self.class_tokens, self._effective(s), s) for s in self.steps]
        text = gather_rows([t.detach() for t in texts], len(self.class_tokens), self.num_parts).requires_grad_()
        images = [self._images(*part, text, step) for part, step in zip(batch, self.steps, strict=True)]
        of_text = sum_of_parts([text_gradient for _, text_gradient, _ in images], self.num_parts)
        added = [loss for loss in (self.method, self.method.replay) if loss is not None]
        extras = zip(*(self._extra(loss, sum(len(labels) for _, labels in batch)) for loss in added), strict=True)
        found = []
        for step, features, (of_images, _, counts), of_extra in zip(self.steps, texts, images, extras, strict=True):
            of_classes = self._back(features, of_text[share(len(of_text), step.part, step.num_parts)])
            found.append(torch.cat([self._flat(*of_extra, of_images, of_classes), counts]))
        return sum_of_parts(found, self.num_parts)

    def _effective(self, step: Step) -> Parameters:
        return self.method.effective(self.parameters, step)

    def _images(self, images: Tensor, labels: Tensor, text: Tensor, step: Step) -> tuple[Gradients, Tensor, Tensor]:
        """Returns what one part's images give: gradients of the parameters, gradient of all text features [C, E], and
        (loss, number of right answers, number of images)."""
        if not len(images) and not self.method.backbone.in_lockstep:
            return [None] * len(self.trained), torch.zeros_like(text), text.new_zeros(3)
        with torch.enable_grad():
            effective = self._effective(step)
            features = self.method.image_features(images, effective)
            leaf = features.detach().requires_grad_()
            logits = self.method.logits(leaf, text, effective)
            labels = labels.to(text.device)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            own = self.method.image_losses(OwnImages(images, labels, leaf, text), self.parameters, step)
            whole = loss if own is None else loss + own.sum()
            of_features, of_text, *direct = torch.autograd.grad(whole, [leaf, text, *self.trained], allow_unused=True)
        correct = (logits.argmax(1) == labels).sum().float()
        counts = torch.stack([loss.detach(), correct, torch.full_like(correct, len(labels))])
        of_parameters = zip(direct, self._back(features, of_features), strict=True)
        return [_added(pair) for pair in of_parameters], _or_zeros(of_text, text), counts

    def _extra(self, added: AddedLoss, num_own_images: int) -> list[Gradients]:
        """Gradients of an added loss for each of this worker's parts, times the number of all images, by which the sum
        over parts is divided in the end."""
        with torch.enable_grad():
            rows = [added.shared_rows(self.parameters, s) for s in self.steps]
        own = [row for row in rows if row is not None]
        shared = gather_rows([r.detach() for r, _ in own], own[0][1], self.num_parts).requires_grad_() if own else None
        with torch.enable_grad():
            returned = [added.extra_loss(self.parameters, replace(s, shared=shared)) for s in self.steps]
            losses = [loss for loss in returned if loss is not None]
            if not losses:
                return [[None] * len(self.trained) for _ in self.steps]
            weight = float(all_reduce_sum(torch.tensor(float(num_own_images), device=losses[0].device)))
            weighted = [loss * (weight / self.num_parts) for loss in losses]
        if shared is None:
            return [_gradients(loss, self.trained) for loss in weighted]
        direct = [_gradients(loss, [shared, *self.trained]) for loss in weighted]
        of_shared = sum_of_parts([_or_zeros(g[0], shared) for g in direct], self.num_parts)
        found: list[Gradients] = []
        for step, (features, num_rows), of_loss in zip(self.steps, own, direct, strict=True):
            of_rows = self._back(features, of_shared[share(num_rows, step.part, step.num_parts)])
            found.append([_added(pair) for pair in zip(of_loss[1:], of_rows, strict=True)])
        return found

    def _back(self, outputs: Tensor, gradient: Tensor) -> Gradients:
        return _gradients(outputs, self.trained, gradient)

    def _flat(self, *terms: Gradients) -> Tensor:
        """Their sum [n], in the order given; zero where there is no gradient."""
        sums = [_added(gradients) for gradients in zip(*terms, strict=True)]
        return torch.cat([_or_zeros(g, p).reshape(-1) for g, p in zip(sums, self.trained, strict=True)])


def class_features(method: Method, class_tokens: Tensor, parameters: Parameters, step: Step) -> Tensor:
    """[c, E]: text features of the classes [C, L] that are the part's; none where there are more parts than classes."""
    mine = class_tokens[share(len(class_tokens), step.part, step.num_parts)]
    if len(mine) or method.backbone.in_lockstep:
        return method.text_features(mine, parameters)
    return torch.zeros(0, method.backbone.embed_dim, device=method.backbone.device)


def _gradients(outputs: Tensor, inputs: Sequence[Tensor], gradient: Tensor | None = None) -> Gradients:
    if not outputs.requires_grad:  # a tower without trained tensors, a part without rows
        return [None] * len(inputs)
    return torch.autograd.grad(outputs, inputs, gradient, allow_unused=True)


def _added(gradients: Sequence[Tensor | None]) -> Tensor | None:
    known = [g for g in gradients if g is not None]
    return reduce(torch.add, known) if known else None


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
