"""Class features at the points of a grid of weights, each computed when an image first needs it.

A new task or vocabulary costs two text passes at first, not one for every image and not a whole table.

Shapes: G points, C classes, E embedding dimensions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor


class FeatureCache:
    """Class features [C, E] by key, the longest unused dropped beyond a number of bytes. For one thread."""

    def __init__(self, max_bytes: float) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = compute().cpu()
            self.num_bytes += found.nbytes
        self._kept.move_to_end(key)
        while self.num_bytes > self._max_bytes and len(self._kept) > 1:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


class ClassTable(Sequence[Tensor]):
    """[G, C, E] at G weights from 0 to 1, point by point.

    kept: where the points are kept, under (key, point). at: class features [C, E] at a weight.
    """

    def __init__(self, num_points: int, kept: FeatureCache, key: Hashable, at: Callable[[float], Tensor]) -> None:
        self._num_points = num_points
        self._kept = kept
        self._key = key
        self._at = at

    def __len__(self) -> int:
        return self._num_points

    def __getitem__(self, point: int) -> Tensor:  # type: ignore[override]
        if not 0 <= point < self._num_points:
            raise IndexError(point)
        return self._kept.get((self._key, point), lambda: self._at(point / (self._num_points - 1)))
