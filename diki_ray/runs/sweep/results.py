"""A sweep's documents in the storage, under sweeps/NAME: a file for each setting, and what is made of them all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diki_ray.config.sweep import SweepConfig
from diki_ray.runs.sweep.trial import digest, spread
from diki_ray.store.objects import Objects


class SweepResults:
    """What is known of the settings of one sweep.

    question: a digest of what their results depend on beside the setting. Results of another question are not seen.
    """

    def __init__(self, storage: str, sweep: str, question: str):
        self.storage, self.sweep, self.question = storage, sweep, question

    def trials(self, sweep: SweepConfig) -> list[dict[str, Any]]:
        """setting, validation, error, stopped_at_epoch, num_tried of every setting that the sweep could try now.

        In the order of the grid or the draws; for optuna as they were found.
        """
        objects = Objects.open(self.storage)
        found = []
        for info in objects.list(f"{self._folder}/trials/{self.question}"):
            trial = json.loads(objects.get(info.path) or b"{}")
            if trial and sweep.covers(trial["setting"]):
                trial["setting"] = _as_configured(trial["setting"], sweep)
                if validation := trial["validation"]:  # its weights may be others now
                    validation["objective"] = spread([sweep.objective.of(v) for v in validation["values"]])
                found.append(trial)
        settings = sweep.settings()
        if sweep.search == "optuna":
            return sorted(found, key=lambda t: t["number"])
        return sorted((t for t in found if t["setting"] in settings), key=lambda t: settings.index(t["setting"]))

    def record(
        self,
        setting: Mapping[str, Any],
        validation: dict[str, Any] | None = None,
        error: str | None = None,
        stopped_at_epoch: float | None = None,
    ) -> None:
        """Keeps what became of a setting; durable when it returns.

        A result outlives what becomes of the setting later: Optuna may draw it again, and ASHA stop it then.
        """
        path = f"{self._folder}/trials/{self.question}/{digest(setting)}.json"
        objects = Objects.open(self.storage)
        before = json.loads(objects.get(path) or b"{}")
        if validation is None and before.get("validation"):
            validation, error, stopped_at_epoch = before["validation"], None, None
        trial = {
            "setting": setting,
            "validation": validation,
            "error": error,
            "stopped_at_epoch": stopped_at_epoch,
            "num_tried": before.get("num_tried", 0) + (error is None),
            "number": before.get("number", len(objects.list(f"{self._folder}/trials/{self.question}"))),
        }
        self._put(path, trial)

    def tested(self, setting: Mapping[str, Any]) -> dict[str, Any] | None:
        data = Objects.open(self.storage).get(self._test(setting))
        return None if data is None else json.loads(data)

    def record_test(self, setting: Mapping[str, Any], test: dict[str, Any]) -> None:
        self._put(self._test(setting), test)

    def num_modules(self) -> int:
        """Returns how many the library has, whoever trained them."""
        return len(Objects.open(self.storage).list("library/keys"))

    def put(self, name: str, data: bytes) -> None:
        Objects.open(self.storage).put(f"{self._folder}/{name}", data)

    @property
    def uri(self) -> str:
        """Where the sweep's documents are, for people."""
        return f"{Objects.open(self.storage).uri}/{self._folder}"

    @property
    def _folder(self) -> str:
        return f"sweeps/{self.sweep}"

    def _test(self, setting: Mapping[str, Any]) -> str:
        return f"{self._folder}/test/{self.question}/{digest(setting)}.json"

    def _put(self, path: str, document: dict[str, Any]) -> None:
        Objects.open(self.storage).put(path, json.dumps(document, indent=1, sort_keys=True).encode())


def _as_configured(setting: Mapping[str, Any], sweep: SweepConfig) -> dict[str, Any]:
    """With its fields in the order in which the sweep has them, which JSON here does not keep."""
    for known in sweep.settings():
        if known == setting:
            return known
    return {name: setting[name] for name in sweep.parameters}
