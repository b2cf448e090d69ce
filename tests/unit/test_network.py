"""Which network workers' collectives use: that of Ray's nodes (tests/ray/test_many_nodes.py has two)."""

from __future__ import annotations

import os

import pytest
import ray.util

from diki_ray.runs.train.network import VARIABLE, interface_of, use_rays_network


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None  # an address for documentation: no machine has it


def test_gloo_is_told_the_interface_unless_a_user_said_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(VARIABLE, "eth7")
    use_rays_network()
    assert os.environ[VARIABLE] == "eth7"
    with monkeypatch.context() as patch:
        patch.delenv(VARIABLE)
        use_rays_network()
        assert os.environ[VARIABLE] == "lo"
