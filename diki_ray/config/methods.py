"""The settings of each method: `method:` in a configuration is one of these sections, chosen by its `name`.

What a setting does, and its published value, is in the method's own file (diki_ray/learning/methods/).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from diki_ray.config.affects import AddedLater, ChangesAnswers, ChangesModule
from diki_ray.config.section import Section


class ZeroShotSection(Section):
    """Nothing is trained: the frozen model answers. The baseline of every comparison."""

    name: ChangesModule[Literal["zero_shot"]]


def _trains_something(section: Any) -> Any:
    if section.image_depth == 0 and section.text_depth == 0:
        raise ValueError("image_depth and text_depth are both 0: there would be nothing to train")
    return section


class PromptSection(Section):
    """Prompts in the first blocks of both towers."""

    name: ChangesModule[str]
    image_depth: ChangesModule[int] = Field(default=8, ge=0)
    """The number of blocks of the image tower, from the first, that have prompts. If the field is not given and the
    tower has fewer blocks than the default, all of them have prompts. The same holds for text_depth and the text
    tower."""
    image_length: ChangesModule[int] = Field(default=8, ge=1)
    """Prompts in each of them."""
    text_depth: ChangesModule[int] = Field(default=8, ge=0)
    text_length: ChangesModule[int] = Field(default=8, ge=1)

    _some_block = model_validator(mode="after")(_trains_something)


class DikiSection(PromptSection):
    """Residual prompt attention. Published on ViT-B/16: depth 8, length 8 in both towers."""

    name: ChangesModule[Literal["diki"]] = "diki"


class ConcatPromptsSection(PromptSection):
    """Prompts in the attention's own softmax; settings as DIKI's."""

    name: ChangesModule[Literal["concat_prompts"]]


class DpwSection(PromptSection):
    """Prompts weighted by a gate for each token, and an adapter for what the gates' cap cuts off. Published on
    ViT-B/16: depth 12, length 8 in both towers, rank 64."""

    name: ChangesModule[Literal["dpw"]]
    rank: ChangesModule[int] = Field(default=64, ge=1)
    """The adapter has this rank."""


class CAdaSection(Section):
    """An adapter that grows by a slice a task."""

    name: ChangesModule[Literal["c_ada"]]
    image_depth: ChangesModule[int] = Field(default=12, ge=1)
    """Blocks of the image tower, from the first, that have an adapter."""
    text_depth: ChangesModule[int] = Field(default=12, ge=0)
    rank: ChangesModule[int] = Field(default=16, ge=1)
    """Units of the slice that each task adds in each block."""
    scale: ChangesModule[float] = Field(default=0.1, gt=0)
    """The adapters' output is multiplied by this."""
    orthogonality: ChangesModule[float] = Field(default=1.0, ge=0)
    """Weight of the loss that keeps a new slice from reading what the old ones read."""


class ReplaySection(Section):
    """A few images of each learnt task, kept in its module and trained on again beside the images of later ones."""

    num_images: ChangesModule[int] = Field(default=200, ge=1, le=10_000)
    """The most images that are kept, over all tasks together."""
    max_bytes: ChangesModule[int] = Field(default=64 * 2**20, ge=1, le=2**30)
    """The most bytes of these images as files, over all tasks together. If they have more, fewer images are kept."""
    score: ChangesModule[Literal["bregman", "confidence", "margin", "entropy", "random", "reservoir"]] = "bregman"
    """The score by which a task's images are chosen once the task is learnt. bregman: how much the logits differ under
    twelve transforms of an image. confidence: 1 less the largest probability, for the image as it is. margin: 1 less
    the distance of the two largest. entropy: that of the answer. All four are higher where the model is less certain.
    random: by chance. reservoir: by chance among all images seen, whatever their classes; with all other scores each
    class keeps equally many images, where it has them."""
    choice: ChangesModule[Literal["bottom", "top", "step"]] = "bottom"
    """bottom: the images with the lowest scores are kept, which are the most certain ones. top: the highest. step: some
    from the lowest to the highest in equal steps, of which the lowest stay when fewer fit. Under random it only
    draws other images; a reservoir has none."""
    batch_size: ChangesModule[int] = Field(default=32, ge=1)
    """Exemplars in a step."""
    weight: ChangesModule[float] = Field(default=1.0, gt=0)
    """The weight of the exemplars' mean loss, beside that of the task's own images."""

    @model_validator(mode="after")
    def _reservoir_is_drawn(self) -> Self:
        if self.score == "reservoir" and self.choice != "bottom":
            raise ValueError("a reservoir is drawn, and not chosen by scores; leave choice out")
        return self


class LowRankSection(Section):
    """Low-rank changes of the query, key and value projections, trained on from task to task."""

    rank: ChangesModule[int] = Field(default=2, ge=1)
    alpha: ChangesModule[float] = Field(default=1.0, gt=0)
    """The change is alpha / rank times the product of the two factors."""
    image_depth: ChangesModule[int | None] = Field(default=None, ge=0)
    """Blocks of the image tower, from the first, that are changed; all by default."""
    text_depth: ChangesModule[int | None] = Field(default=None, ge=0)
    replay: Annotated[ChangesModule[ReplaySection | None], AddedLater()] = None
    """An exemplar memory; none by default."""

    _some_block = model_validator(mode="after")(_trains_something)


class SequentialLoraSection(LowRankSection):
    """Low-rank fine-tuning, task after task, with remedies against forgetting."""

    name: ChangesModule[Literal["sequential_lora"]]
    against_forgetting: ChangesModule[Literal["none", "ewc", "badam", "blip"]] = "none"
    """ewc: elastic weight consolidation. badam: Bayesian adaptive moment regularisation. blip: bit-level information
    preserving."""
    wise_ft: ChangesModule[float] = Field(default=1.0, ge=0, le=1)
    """Answers are given under weights that are this share of the way from the frozen model to the fine-tuned one."""
    ewc_lambda: ChangesModule[float] = Field(default=1000.0, gt=0)
    """Strength of the penalty; only with against_forgetting: ewc."""
    badam_std: ChangesModule[float] = Field(default=0.01, gt=0)
    """Deviation of every weight before the first task; only with against_forgetting: badam."""
    blip_prior: Annotated[ChangesModule[float], AddedLater()] = Field(default=1e-10, ge=1e-20)
    """Every weight's Fisher information before the first task is this value times the number of weights that feed the
    same output; only with against_forgetting: blip. A smaller value freezes more bits. The right value depends on the
    data; choose it on validation images."""


class KeepLoraSection(LowRankSection):
    """Low-rank changes in directions that neither the pre-trained weights nor earlier tasks rely on, of the output
    projections too."""

    name: ChangesModule[Literal["keep_lora"]]
    rank: ChangesModule[int] = Field(default=16, ge=1)
    alpha: ChangesModule[float] = Field(default=16.0, gt=0)
    """The change is alpha / rank times the product of the two factors."""
    image_energy: ChangesModule[float] = Field(default=0.85, ge=0, lt=1)
    """In each frozen projection of the image tower, no task may read the leading directions that hold this share of the
    energy (squared singular values). With a larger share less is learnt and less is forgotten."""
    text_energy: ChangesModule[float] = Field(default=0.2, ge=0, lt=1)
    """The same of the text tower."""
    input_energy: ChangesModule[float] = Field(default=0.99, ge=0, lt=1)
    """In each projection, no later task may read the leading directions that hold this share of the energy of a task's
    inputs."""


class ReferenceSection(LowRankSection):
    """Low-rank changes, distilled on a reference."""

    reference: ChangesModule[str | None] = None
    """A prepared data set that is not a task of the stream. With the embedded backbone the default is its pre-training
    pictures."""
    num_reference: ChangesModule[int] = Field(default=1024, ge=2)
    """How many of its images, from the first, training draws from."""


class ZsclSection(ReferenceSection):
    """Distillation from the frozen model on data of no task, and averages of the weights."""

    name: ChangesModule[Literal["zscl"]]
    temperature: ChangesModule[float] = Field(default=2.0, gt=0)
    """The temperature of the distillation."""
    weight_consolidation: ChangesModule[float] = Field(default=1.0, ge=0)
    """The weight of the squared distance to the weights at the start of the task."""
    average_every: ChangesModule[int] = Field(default=100, ge=1)
    """Steps from one sample of the average of the weights to the next."""
    reference_batch: ChangesModule[int] = Field(default=64, ge=2)
    """Images, and captions, of the reference in a step."""


class SndSection(ReferenceSection):
    """Distillation on data of no task from two teachers, the frozen model and the one before the task."""

    name: ChangesModule[Literal["snd"]]
    previous_weight: ChangesModule[float] = Field(default=9.0, ge=0)
    """The weight of the squared distance to the features of the model before the task."""
    pretrained_weight: ChangesModule[float] = Field(default=0.5, ge=0)
    """The weight of the squared distance to the frozen model's features."""
    reference_batch: ChangesModule[int] = Field(default=32, ge=2)
    """Images of the reference in a step."""


class MulkiSection(LowRankSection):
    """Distillation on the task's own images from two teachers, and integrated weights; after MulKI's description, with
    formulas of this platform's own."""

    name: ChangesModule[Literal["mulki"]]
    alignment: ChangesModule[float] = Field(default=1.0, ge=0)
    """Weight of the loss that pulls images and class texts to the prototypes of their classes."""
    distillation: ChangesModule[float] = Field(default=1.0, ge=0)
    """Weight of the loss that keeps the teachers' relations of images to prototypes and class texts."""
    average_decay: ChangesModule[float] = Field(default=0.9, ge=0, lt=1)
    """What is left of the moving average of the weights after each step."""
    interpolation: ChangesModule[float] = Field(default=0.7, gt=0, le=1)
    """A task ends this share of the way from the weights before it to the average of those that it trained."""


class RailSection(Section):
    """Ridge regression on random features of the frozen ones; no gradient."""

    name: ChangesModule[Literal["rail"]]
    hidden_dim: ChangesModule[int] = Field(default=2048, ge=1)
    """Random features (published: 15,000); a task's sums take 8 bytes times its square."""
    ridge: ChangesAnswers[float] = Field(default=0.1, gt=0)
    fusion: ChangesAnswers[float] = Field(default=0.9, ge=0, le=1)
    """The regression's share of an answer; the rest is zero-shot."""
    projection_seed: ChangesModule[int] = Field(default=0, ge=0)
    """The random projection, which all tasks share, is drawn from this seed."""


class MahalanobisSection(Section):
    """A low-rank Mahalanobis metric of each class on the frozen features, learnt with a moving average of the weights
    as teacher; for streams in which the same classes come in other domains."""

    name: ChangesModule[Literal["mahalanobis"]]
    rank: ChangesModule[int] = Field(default=4, ge=1)
    """Directions of each class's own in the metric."""
    distillation: ChangesModule[float] = Field(default=1.0, ge=0)
    """Weight of the loss that holds to the teacher's answers."""
    average_decay: ChangesModule[float] = Field(default=0.99, ge=0, lt=1)
    """What is left of the teacher after each step; the rest is what is trained."""
    fusion: ChangesAnswers[float] = Field(default=0.9, ge=0, le=1)
    """The metric's share of an answer; the rest is zero-shot."""


class ClassesSection(Section):
    """The class model alone: nothing is trained. Its settings are those of `class_model`."""

    name: ChangesModule[Literal["classes"]]


def _name_of(value: Any) -> Any:
    return value.get("name", "diki") if isinstance(value, dict) else getattr(value, "name", None)


MethodSection = Annotated[
    Annotated[ZeroShotSection, Tag("zero_shot")]
    | Annotated[DikiSection, Tag("diki")]
    | Annotated[ConcatPromptsSection, Tag("concat_prompts")]
    | Annotated[DpwSection, Tag("dpw")]
    | Annotated[CAdaSection, Tag("c_ada")]
    | Annotated[SequentialLoraSection, Tag("sequential_lora")]
    | Annotated[KeepLoraSection, Tag("keep_lora")]
    | Annotated[ZsclSection, Tag("zscl")]
    | Annotated[SndSection, Tag("snd")]
    | Annotated[MulkiSection, Tag("mulki")]
    | Annotated[RailSection, Tag("rail")]
    | Annotated[MahalanobisSection, Tag("mahalanobis")]
    | Annotated[ClassesSection, Tag("classes")],
    Discriminator(_name_of, custom_error_type="no_such_method", custom_error_message="there is no such method"),
]

METHOD_SECTIONS: dict[str, type[Section]] = {
    tag.tag: section for section, tag in (get_args(option) for option in get_args(get_args(MethodSection)[0]))
}
