"""The settings of each method: `method:` in a configuration is one of these sections, chosen by its `name`.

What a setting does, and its published value, is in the method's own file (diki_ray/model/methods/).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from diki_ray.section import Section


class ZeroShotSection(Section):
    """Nothing is trained: the frozen model answers. The baseline of every comparison."""

    name: Literal["zero_shot"]


class PromptSection(Section):
    """Prompts in the first blocks of both towers."""

    name: str
    image_depth: int = Field(default=8, ge=0)
    """Blocks of the image tower, from the first, that have prompts."""
    image_length: int = Field(default=8, ge=1)
    """Prompts in each of them."""
    text_depth: int = Field(default=8, ge=0)
    text_length: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _something_to_train(self) -> Self:
        if self.image_depth == 0 and self.text_depth == 0:
            raise ValueError("image_depth and text_depth are both 0: there would be nothing to train")
        return self


class DikiSection(PromptSection):
    """Residual prompt attention. Published on ViT-B/16: depth 8, length 8 in both towers."""

    name: Literal["diki"] = "diki"


class ConcatPromptsSection(PromptSection):
    """Prompts in the attention's own softmax; settings as DIKI's."""

    name: Literal["concat_prompts"]


class DpwSection(PromptSection):
    """Prompts weighted by a gate for each token, and an adapter for what the gates' cap cuts off. Published on
    ViT-B/16: depth 12, length 8 in both towers, rank 64."""

    name: Literal["dpw"]
    rank: int = Field(default=64, ge=1)
    """Of the adapter."""


class CAdaSection(Section):
    """An adapter that grows by a slice a task."""

    name: Literal["c_ada"]
    image_depth: int = Field(default=12, ge=1)
    """Blocks of the image tower, from the first, that have an adapter."""
    text_depth: int = Field(default=12, ge=0)
    rank: int = Field(default=16, ge=1)
    """Units of the slice that each task adds in each block."""
    scale: float = Field(default=0.1, gt=0)
    """Of the adapters' output."""
    orthogonality: float = Field(default=1.0, ge=0)
    """Weight of the loss that keeps a new slice from reading what the old ones read."""


def _name_of(value: Any) -> Any:
    return value.get("name", "diki") if isinstance(value, dict) else getattr(value, "name", None)


MethodSection = Annotated[
    Annotated[ZeroShotSection, Tag("zero_shot")]
    | Annotated[DikiSection, Tag("diki")]
    | Annotated[ConcatPromptsSection, Tag("concat_prompts")]
    | Annotated[DpwSection, Tag("dpw")]
    | Annotated[CAdaSection, Tag("c_ada")],
    Discriminator(_name_of, custom_error_type="no_such_method", custom_error_message="there is no such method"),
]

METHOD_SECTIONS: dict[str, type[Section]] = {
    tag.tag: section for section, tag in (get_args(option) for option in get_args(get_args(MethodSection)[0]))
}
