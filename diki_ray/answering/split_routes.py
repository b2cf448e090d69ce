"""The routes of a test set's images once any tasks are learnt, each set of tasks asked about once.

A router is asked with (frozen features, tasks learnt) and gives task and weight of each image. Nothing else relies on
a task's density being the same whatever else is learnt.

Shapes: N images of a test set, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diki_ray.answering.routing import NO_TASK, ROUTED, Router, Routes, Routing, Scores, unrouted
from diki_ray.config import Config
from diki_ray.learning.methods import METHODS
from diki_ray.learning.methods.base import Answering

Learnt = frozenset[int] | tuple[int, ...]
"""Tasks learnt: their set, or their order where it matters."""
Sets = dict[tuple[int, ...], tuple[tuple[int, ...], frozenset[int]]]


@dataclass(frozen=True, eq=False)
class SplitRoutes:
    """For each image of a test set the task it is routed to, and its weights, once some tasks are learnt."""

    task: np.ndarray  # int64 [N], NO_TASK: none
    weight: np.ndarray  # float64 [N], the image's own
    text_weight: np.ndarray  # float64 [N], of the class features
    module: np.ndarray  # int64 [N], the task whose module answers; NO_TASK: the frozen model, also below skip_weight
    ordered: bool = False
    """Whether the order of the tasks matters: two are tied for an image, or the one learnt last answers."""

    def same_as(self, other: SplitRoutes) -> bool:
        return self.ordered == other.ordered and all(
            np.array_equal(getattr(self, n), getattr(other, n)) for n in ("task", "weight", "text_weight", "module")
        )


class RoutesAfter:
    """The routes of a test set after any tasks; called with them in the order in which they were learnt. Most tasks
    change no route of a test set, and the routes before and after them are one object.

    ask: gives the routes after some tasks. It is called once for each set of them, or once for each order of a set
        where its answer says that the order matters.
    no_module: whatever the routes, no module answers.
    sets: the orders of tasks asked about, each with its set, which test sets share: a thousand tasks have a thousand
        test sets, which all are asked about the same thousand sets, of half a million numbers.
    """

    def __init__(
        self,
        ask: Callable[[tuple[int, ...]], SplitRoutes],
        no_module: bool = False,
        sets: Sets | None = None,
    ):
        self._ask, self.no_module = ask, no_module
        self._sets: Sets = {} if sets is None else sets
        self._known: dict[Learnt, SplitRoutes] = {}
        self._last: SplitRoutes | None = None

    def __call__(self, learnt: Iterable[int]) -> SplitRoutes:
        order, members = self._shared(tuple(learnt))
        found = self._known.get(members) or self._known.get(order)
        if found is None:
            found = self._ask(order)
            if self._last is not None and found.same_as(self._last):
                found = self._last
            self._last = self._known[order if found.ordered else members] = found
        return found

    def key(self, learnt: Iterable[int]) -> Learnt:
        """Returns what the answers after some tasks are to be kept by: their set, or their order where it matters.

        It is one object for all test sets: a million pairs of a set of tasks and a test set would hold 30 GB of copies.
        """
        order, members = self._shared(tuple(learnt))
        return order if self(order).ordered else members

    def _shared(self, order: tuple[int, ...]) -> tuple[tuple[int, ...], frozenset[int]]:
        return self._sets.get(order) or self._sets.setdefault(order, (order, frozenset(order)))


@dataclass(frozen=True, eq=False)
class SplitRouter:
    """Routes whole test sets as an evaluation does.

    skip_weight: images of a lower weight are answered by the frozen model; 0 is off.
    sets: the orders of tasks that were asked about, which all test sets share (`RoutesAfter`).
    """

    router: Router
    answering: Answering
    routing: Routing
    skip_weight: float = 0.0
    sets: Sets = field(default_factory=dict)

    @staticmethod
    def of(config: Config, router: Router) -> SplitRouter:
        answering = METHODS[config.method.name].answering
        return SplitRouter(router, answering, config.evaluate.routing, config.evaluate.skip_weight)

    def routes(self, frozen: Tensor, sizes: Sequence[int]) -> RoutesAfter:
        """The routes of images with these frozen features [N, E], which lie in canonical batches of these sizes."""
        if self.answering not in ROUTED:
            last_counts = self.answering == "latest"
            return RoutesAfter(
                lambda n: self._joined([unrouted(len(frozen), self.answering, n)], last_counts), sets=self.sets
            )
        scores = self.router.about(frozen)
        before: tuple[tuple[int, ...], tuple[int, ...]] | None = None

        def ask(learnt: tuple[int, ...]) -> SplitRoutes:
            nonlocal before
            among = learnt
            if self.router.by_task and before is not None and before[0] == learnt[:-1]:
                among = (*before[1], learnt[-1])  # a task that was no image's best does not become it by one more
            found = scores(among)
            before = learnt, self._best(found)
            batches = [found]
            if self.routing == "batch":
                parts = zip(found.log_density.split(list(sizes)), found.weight.split(list(sizes)), strict=True)
                batches = [Scores(among, log_density, weight) for log_density, weight in parts]
            return self._joined([b.routes(self.routing) for b in batches], any(self._tied(b) for b in batches))

        return RoutesAfter(ask, self.answering == "classes", self.sets)

    def _joined(self, routes: Sequence[Routes], ordered: bool) -> SplitRoutes:
        task, weight, text_weight = (torch.cat([vars(r)[n] for r in routes]) for n in ("task", "weight", "text_weight"))
        module = torch.where((weight < self.skip_weight) | (self.answering == "classes"), NO_TASK, task)
        return SplitRoutes(task.numpy(), weight.numpy(), text_weight.numpy(), module.numpy(), ordered)

    def _best(self, scores: Scores) -> tuple[int, ...]:
        """Returns the tasks that some image is routed to, or is tied with; in the order in which they were learnt."""
        among = scores.log_density
        if not among.numel():
            return ()
        best = (among == among.max(1, keepdim=True).values).any(0)
        return tuple(task for task, is_best in zip(scores.learnt, best.tolist(), strict=True) if is_best)

    def _tied(self, scores: Scores) -> bool:
        """Whether an image, or the vote of a batch, has two best tasks."""
        among = scores.log_density
        if not among.numel():
            return False
        best, task = among.max(1, keepdim=True)
        votes = torch.bincount(task.flatten(), minlength=among.shape[1])
        tied_vote = self.routing == "batch" and int((votes == votes.max()).sum()) > 1
        return tied_vote or bool(((among == best).sum(1) > 1).any())
