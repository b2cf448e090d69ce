"""Other ways to hold weights and activations, as whole jobs: the modules of a run with neither (2 workers, ddp)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from job_runs import Run, assert_same_modules

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is NOT tried: it is not installed (DS_BUILD_OPS=0 pip install -e '.[deepspeed]')",
)


@needs_deepspeed
@pytest.mark.parametrize("offload", ["false", "true"])
def test_weights_shared_out_to_the_workers_train_the_same_modules(
    offload: str, tmp_path: Path, undisturbed: Run
) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    done = run.start("train.strategy=deepspeed", f"train.offload={offload}")
    assert done.returncode == 0, done.stderr
    assert_same_modules(run, undisturbed, atol=1e-5)
    for task, module in run.modules().items():
        assert module.key == undisturbed.modules()[task].key
        assert module.provenance["train"]["strategy"] == "deepspeed"


def test_activations_computed_again_train_the_same_modules_to_the_bit(tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path, undisturbed.prepared)
    done = run.start("train.activation_checkpointing=true")
    assert done.returncode == 0, done.stderr
    assert all(module.provenance["train"]["activation_checkpointing"] for module in run.modules().values())
    assert_same_modules(run, undisturbed, atol=0)
    assert run.results()["accuracy"] == undisturbed.results()["accuracy"]


def test_a_deepspeed_that_cannot_run_on_the_workers_is_one_sentence(
    tmp_path: Path, undisturbed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "packages/deepspeed"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('no compiler for this card')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent), prepend=":")
    done = Run(tmp_path, undisturbed.prepared).start("train.strategy=deepspeed")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "error: train.strategy=deepspeed: DeepSpeed cannot run here (RuntimeError: no compiler for this card); "
        "set train.strategy=ddp."
    )
    assert "Traceback" not in done.stderr
