"""Workers are made ready for training together, over the network by which Ray's nodes reach each other.

gloo takes the address that the machine's own name has. Debian and others give that name a loopback address, and then
workers on two machines wait for each other at 127.0.0.1.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"


def use_rays_network() -> None:
    """Make this process' collectives use the interface with its node's address; what a user has set stays."""
    if VARIABLE not in os.environ and (name := interface_of(ray.util.get_node_ip_address())) is not None:
        os.environ[VARIABLE] = name


def interface_of(address: str) -> str | None:
    """The name of this machine's interface with an address; None where none has it."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, known in interfaces if address in (one.address for one in known)), None)


def import_training() -> None:
    """Imports in a worker what it trains with: seconds in which it may die.

    Ray starts a group anew when a worker dies here. It gives up (2.60) when one dies while it is handed the training
    function, and would import all this then.
    """
    import diki_ray.runs.train.worker  # noqa: F401


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(import_training)
        worker_group.execute(use_rays_network)
        super().on_start(worker_group, backend_config)


class TorchOnRaysNetwork(TorchConfig):
    """Ray's, whose process group is on the network of Ray's nodes."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
