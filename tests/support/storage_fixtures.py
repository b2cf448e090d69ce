"""Storages for the store's tests: on a disk, and a bucket in memory."""

import os

import pytest
from obstore.store import MemoryStore
from storage_faults import no_sync

from diki_ray.store.objects import BucketObjects, LocalObjects, Objects


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(os, "fsync", no_sync)


@pytest.fixture(params=["disk", "bucket"])
def objects(request, tmp_path) -> Objects:
    return (
        LocalObjects(str(tmp_path / "storage"))
        if request.param == "disk"
        else BucketObjects("memory://", MemoryStore())
    )


@pytest.fixture
def disk(tmp_path) -> LocalObjects:
    return LocalObjects(str(tmp_path / "storage"))
