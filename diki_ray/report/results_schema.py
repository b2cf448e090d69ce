"""What results.json must be before a page, a card or a run that goes on reads it: types, ranges, and as many of each as
there are tasks. Fields that nothing reads, and those of a later version, are let be.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diki_ray.errors import CorruptError

_Text = Annotated[str, Field(max_length=65_536)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Number = Annotated[float, Field(ge=-1e15, le=1e15)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Row = list[_Share | None]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Backbone(_Part):
    name: _Text
    digest: _Text
    embed_dim: _Count


class _Evaluated(_Part):
    label_space: _Text
    routing: _Text
    batch_size: _Count


class _Named(_Part):
    name: _Text
    storage: _Text


class _Weights(_Part):
    pretrained: _Text | None


class _Source(_Part):
    data: _Text
    name: _Text | None
    shots: _Count | None


class _Config(_Part):
    """The sections that a page reads; whether the rest is a configuration is asked where it is used as one."""

    run: _Named
    evaluate: _Evaluated
    backbone: _Weights
    tasks: list[_Source]


class _Data(_Part):
    uri: _Text
    digest: _Text
    protocol: _Text
    sizes_that_differ: dict[str, Any] = {}
    shortcomings: list[_Text] = []


class _Module(_Part):
    key: _Text
    digest: _Text
    num_parameters: _Count
    parameters_of: _Text | None = None


class _Epoch(_Part):
    loss: _Number | None = None
    accuracy: _Share | None = None
    validation_accuracy: _Share | None = None


class _Routed(_Part):
    tasks: list[_Count]
    frozen: _Count


class _Histogram(_Part):
    mean: _Share | None
    counts: Annotated[list[_Count], Field(min_length=1, max_length=1000)]


class _Integration(_Part):
    learnt: _Histogram
    unlearnt: _Histogram | None


class _Example(_Part):
    sample: _Count
    key: _Text
    label: _Text
    answer: _Text
    zero_shot_answer: _Text
    right: bool
    confidence: _Share
    routed: _Text | None
    weight: _Share


class _Task(_Part):
    name: _Text
    class_names: Annotated[list[_Text], Field(min_length=1)]
    templates: Annotated[list[_Text], Field(min_length=1)]
    chance: _Share | None
    data: _Data
    module: _Module
    num_train: _Count
    num_test: _Count
    num_skipped_train: _Count
    skipped_test: dict[_Text, _Count]
    best_epoch: _Count | None
    history: list[_Epoch]
    routed: _Routed
    weights: _Integration
    examples: Annotated[list[_Example], Field(max_length=1000)]


class _Figure(_Part):
    """A metric: forgetting and transfer may be below zero."""

    mean: _Number | None
    per_task: list[_Number | None]


class _Figures(_Part):
    transfer: _Figure
    average: _Figure
    last: _Figure
    forgetting: _Figure
    backward_transfer: _Figure


class _Notes(_Part):
    text_feature_error: _Number | None = None
    text_grid: _Count | None = None


class _Results(_Part):
    format: Literal[1]
    run: _Text
    protocol: _Text
    config_digest: _Text
    config: _Config
    backbone: _Backbone
    command: _Text
    finished_at: _Text
    versions: dict[_Text, _Text]
    seconds: dict[_Text, Annotated[float, Field(ge=0, le=1e12)]]
    trained: list[_Text]
    notes: _Notes
    tasks: Annotated[list[_Task], Field(min_length=1)]
    zero_shot: _Row
    accuracy: list[_Row]
    metrics: _Figures

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        num = len(self.tasks)
        rows = [*self.accuracy, self.zero_shot, *(figure.per_task for _, figure in self.metrics)]
        rows += [task.routed.tasks for task in self.tasks]
        if len(self.accuracy) != num or any(len(row) != num for row in rows):
            raise ValueError(f"there are {num} tasks, and not as many in every row")
        if any(len({len(h.counts) for h in (t.weights.learnt, t.weights.unlearnt) if h}) > 1 for t in self.tasks):
            raise ValueError("histograms of one task have other numbers of bins")
        for task in self.tasks:
            if task.best_epoch is not None and task.best_epoch >= len(task.history):
                raise ValueError(f"task {task.name!r:.200} has no epoch {task.best_epoch}")
        return self


def check_results(document: Any, where: str) -> dict[str, Any]:
    """The document, if it is one of results as a run writes them.

    Raises:
        CorruptError: it is not; names the first field that is wrong.
    """
    try:
        _Results.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise CorruptError(
            f"{where} are not what a run writes ({place}: {first['msg'][:300]}): evaluate the run again."
        ) from None
    assert isinstance(document, dict)
    return document
