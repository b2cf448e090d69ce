"""`train.strategy: deepspeed`: the frozen weights shared out to the workers, and the module that `ddp` trains."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fake_store import FakeStore, the_module
from learning import tiny_plan, worker_of
from processes import run_ranks

from diki_ray.clip import sharded
from diki_ray.config import parse
from diki_ray.errors import ConfigError
from diki_ray.runs.plan import load_backbone, make_plan

TRAIN = {"epochs": 2, "batch_size": 8}
"""40 images: 5 batches an epoch at the published learning rate, and an odd number for the statistics' two workers."""
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is NOT tried: it is not installed (DS_BUILD_OPS=0 pip install -e '.[deepspeed]')",
)


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train does
    plan = tiny_plan(Path(folder), train=TRAIN)
    backbone, whole = load_backbone(plan.config), load_backbone(plan.config)
    dist.init_process_group("gloo", f"file://{folder}/group", world_size=2, rank=rank)
    sharded.shard(backbone)
    assert sharded.resident_bytes(backbone) < 0.55 * sharded.resident_bytes(whole)

    # One worker has nothing to do: it makes the other's passes with it, and gets nothing.
    images, tokens = torch.rand(3 * rank, 3, 32, 32), backbone.tokenize(["cat"], "a {}.")[:rank]
    with torch.no_grad():
        features = backbone.encode_image(images), backbone.encode_text(tokens)
        if rank == 1:
            torch.testing.assert_close(features[0], whole.encode_image(images), atol=1e-6, rtol=0)
            torch.testing.assert_close(features[1], whole.encode_text(tokens), atol=1e-6, rtol=0)
    assert [f.shape for f in features] == [(3 * rank, 32), (rank, 32)]

    store = FakeStore(Path(folder) / "deepspeed") if rank == 0 else None
    worker_of(plan, store, backbone).learn(plan.tasks[0])
    assert sharded.resident_bytes(backbone) < 0.55 * sharded.resident_bytes(whole)  # nothing was left gathered
    dist.destroy_process_group()


@needs_deepspeed
def test_two_workers_with_half_the_weights_each_train_the_module_of_ddp(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, train=TRAIN)
    run_ranks(one_of_two, str(tmp_path), num_ranks=2)
    worker_of(plan, FakeStore(tmp_path / "ddp")).learn(plan.tasks[0])

    module, expected = the_module(tmp_path / "deepspeed"), the_module(tmp_path / "ddp")
    assert module.key == expected.key
    assert module.provenance["consumed"] == expected.provenance["consumed"]
    for name, array in expected.parameters.items():
        np.testing.assert_allclose(module.parameters[name], array, atol=1e-5, rtol=0, err_msg=name)
        assert np.abs(array).max() > 1e-3  # something was learnt
    np.testing.assert_allclose(module.moments.mean, expected.moments.mean, atol=1e-6)
    assert module.moments.count == expected.moments.count
    np.testing.assert_allclose(module.validation_features, expected.validation_features, atol=1e-3)


def test_without_deepspeed_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed here; `DS_BUILD_OPS=0 pip install 'diki-ray\[deepspeed\]'`"):
        sharded.require_deepspeed()


def test_offload_without_deepspeed_is_refused_and_the_strategy_changes_no_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="offload is for strategy=deepspeed"):
        parse({"run": {"name": "x"}, "tasks": [{"data": "embedded:digits"}], "train": {"offload": True}})
    plan = tiny_plan(tmp_path, train=TRAIN)
    tree = plan.config.model_dump()
    tree["train"] |= {"strategy": "deepspeed", "offload": True}
    other = parse(tree)
    assert make_plan(other, load_backbone(other)).tasks == plan.tasks
    assert other.digest() == plan.config.digest()
