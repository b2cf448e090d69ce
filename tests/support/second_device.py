"""A second device on a machine that has one: tensors moved to `meta` are computed on the CPU, and refuse what a card's
refuse.

A card raises an error where its tensors meet the CPU's; the CPU alone never shows that. Inside `second_device()`,
tensors on `DEVICE` hold their numbers in the CPU's memory, and an operation that mixes the two raises as on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
MAY_MIX = ("aten::copy_", "aten::_to_copy")
INDICES_MAY_BE_ON_THE_CPU = ("aten::index.", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index")


class DeviceTensor(torch.Tensor):
    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
            requires_grad=numbers.requires_grad,
        )
        made.numbers = numbers.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.numbers!r})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of the second device to numpy; use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def item(self) -> Any:  # torch refuses these for `meta` before it asks
        return self.numbers.item()

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def __int__(self) -> int:
        return int(self.numbers)

    def __float__(self) -> float:
        return float(self.numbers)

    def __index__(self) -> int:
        return self.numbers.__index__()


def _check(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operation is the second device's."""
    name = func.name()
    flat = tree_flatten((args, kwargs))[0]
    ours = [t for t in flat if isinstance(t, DeviceTensor)]
    others = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor)]
    if not ours or name.startswith(MAY_MIX):
        return bool(ours)
    if name.startswith(INDICES_MAY_BE_ON_THE_CPU):
        values = [t for t in (args[0], *args[2:]) if isinstance(t, torch.Tensor)]
        there = {isinstance(t, DeviceTensor) for t in values if t.dim()}
        indices = [t for t in tree_flatten(args[1])[0] if isinstance(t, DeviceTensor)]
        if len(there) > 1 or (indices and not isinstance(args[0], DeviceTensor)):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
    elif any(t.dim() for t in others):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two: {name}")
    return True


def run(func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
    given = kwargs.get("device")
    ours = _check(func, args, kwargs)
    if given is not None:
        ours = torch.device(given) == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
    with torch.utils._python_dispatch._disable_current_modes():
        inner = tree_map(lambda t: t.numbers if isinstance(t, DeviceTensor) else t, (args, kwargs))
        out = func(*inner[0], **inner[1])
    first = args[0] if args else None
    if func.name().startswith("aten::copy_"):
        return first
    if func.name().startswith("aten::_to_copy") and given is not None and ours and out is first:
        out = out.clone()
    if not ours:
        return out
    wrapped = tree_map(lambda t: DeviceTensor(t) if isinstance(t, torch.Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _MadeOfNumbers(TorchFunctionMode):
    """`torch.tensor` fills its tensor below the dispatcher, and one on `meta` it does not fill."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and (device := kwargs.pop("device", None)) is not None:
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[None]:
    with _Dispatched(), _MadeOfNumbers():
        yield
