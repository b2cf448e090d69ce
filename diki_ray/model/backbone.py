"""The frozen CLIP: any open_clip model whose two towers are open_clip's own transformers.

A backbone is one of
* `embedded`: the tiny CLIP that ships with the package;
* an open_clip name with its weights (`ViT-B-16`, `openai`, or a local file instead of the tag);
* a Python file with `create(directory) -> (model, preprocess, tokenizer)`, for in-house CLIPs.

Shapes: B images, C texts, L tokens, E embedding dimensions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional as F

from diki_ray.errors import ConfigError
from diki_ray.model.residual import Residual, Tower

EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny_clip" / "create.py"


class Backbone:
    """A frozen CLIP with a residual branch's place in both towers.

    Raises:
        ConfigError: a tower without open_clip's own attention blocks (ResNet, ConvNeXt, timm and Hugging Face towers).
    """

    def __init__(self, model: nn.Module, preprocess: Callable[[Any], Tensor], tokenizer: Callable, name: str = "model"):
        self.name = name
        self.model: Any = model.eval().requires_grad_(False)  # Any: open_clip is untyped
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.image = Tower("image", _attention_blocks(getattr(model, "visual", None), name, "image"))
        self.text = Tower("text", _attention_blocks(model, name, "text"))
        projection: Any = self.model.text_projection
        self.embed_dim: int = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[-1]

    @property
    def towers(self) -> tuple[Tower, Tower]:
        return self.image, self.text

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.transformer.get_cast_dtype()

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Backbone:
        """Moves the model; with bfloat16 its matrix weights are stored so, layer norms stay float32."""
        self.model.to(device)
        if dtype is not torch.float32:
            open_clip.model.convert_weights_to_lp(self.model, dtype)
        return self

    def encode_image(self, images: Tensor, residual: Residual | None = None) -> Tensor:
        """L2-normalised features [B, E] float32 of images [B, 3, H, W]; with a residual, under it."""
        self.image.active = residual
        features = self.model.encode_image(images.to(self.device, self.dtype))
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, tokens: Tensor, residual: Residual | None = None) -> Tensor:
        """L2-normalised features [C, E] float32 of tokens [C, L]; with a residual, under it.

        Where attention is causal and the feature is read at the end of text, tokens after the longest text's end
        change nothing: they are cut off, exact to float32 rounding. (open_clip's `CLIP.encode_text` refuses
        shorter inputs, hence the seven lines of it here.)
        """
        model, tokens = self.model, tokens.to(self.device)
        self.text.active = residual
        length = self._needed_length(tokens)
        tokens = tokens[:, :length]
        x = model.token_embedding(tokens).to(self.dtype)
        x = x + model.positional_embedding[:length].to(x.dtype)
        mask = None if model.attn_mask is None else model.attn_mask[:length, :length]
        x = model.ln_final(model.transformer(x, attn_mask=mask))
        x = text_global_pool(x, tokens, model.text_pool_type, eos_token_id=getattr(model, "text_eos_id", None))
        projection = model.text_projection
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return F.normalize(x.float(), dim=-1)

    def _needed_length(self, tokens: Tensor) -> int:
        causal, pooled = self.model.attn_mask is not None, self.model.text_pool_type
        if not causal or pooled not in ("argmax", "eos"):
            return tokens.shape[1]
        end = tokens.argmax(-1) if pooled == "argmax" else (tokens == self.model.text_eos_id).int().argmax(-1)
        return int(end.max()) + 1

    def tokenize(self, class_names: Sequence[str], template: str) -> Tensor:
        """Token ids [C, L] of the class names in the template; underscores in names become spaces."""
        return self.tokenizer([template.format(name.replace("_", " ")) for name in class_names])

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """exp(logit_scale) · f_img f_txtᵀ [B, C]; text features [C, E], or [B, C, E] where each image has its own."""
        scale = self.model.logit_scale.exp().float()
        if text_features.dim() == 3:
            return scale * torch.einsum("be,bce->bc", image_features, text_features)
        return scale * image_features @ text_features.T

    def digest(self) -> str:
        """sha256 over every weight, the image preprocessing and the architecture."""
        h = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            h.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            h.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        activation = type(self.model.transformer.resblocks[0].mlp[1]).__name__
        heads = [tower_blocks[0].attn.num_heads for tower_blocks in (self._blocks("image"), self._blocks("text"))]
        preprocess = re.sub(r" at 0x[0-9a-f]+", "", repr(self.preprocess))  # addresses of functions differ by process
        h.update(f"{activation} {heads} {self.model.text_pool_type} {preprocess}".encode())
        return h.hexdigest()

    def _blocks(self, tower: str) -> Any:
        return (self.model.visual if tower == "image" else self.model).transformer.resblocks


def _attention_blocks(owner: Any, name: str, tower: str) -> list[Any]:
    blocks: Any = getattr(getattr(owner, "transformer", None), "resblocks", None)
    usable = blocks and all(
        isinstance(getattr(block, "attn", None), nn.MultiheadAttention) and block.attn._qkv_same_embed_dim
        for block in blocks
    )
    if not usable:
        raise ConfigError(
            f"backbone {name!r}: its {tower} tower has no transformer of open_clip's own attention blocks, and the "
            "residual branch needs them; choose a native ViT CLIP such as ViT-B-16, ViT-L-14 or ViT-B-32."
        )
    return list(blocks)


def load(name: str, pretrained: str | None = None, directory: str | None = None) -> Backbone:
    """The backbone of that name on the CPU in float32, ready to be frozen beside.

    Args:
        name: `embedded`, an open_clip model name, or the path of a Python file with `create(directory)`.
        pretrained: open_clip's tag of the weights, or a local file with them.
        directory: given to `create`; the file's own folder by default.

    Raises:
        ConfigError: no such name, file or weights, or a tower that is not a native transformer.
    """
    if name == "embedded":
        return _from_file(EMBEDDED, None, name)
    if name.endswith(".py"):
        return _from_file(Path(name).expanduser(), directory, name)
    if name not in open_clip.list_models():
        raise ConfigError(
            f"backbone.name: {name!r} is neither `embedded`, nor a Python file, nor one of open_clip's models "
            f"(such as ViT-B-16, ViT-L-14; `open_clip.list_models()` has them all)."
        )
    if pretrained is None:
        raise ConfigError(f"backbone.pretrained: {name!r} needs weights: a tag such as `openai`, or a local file.")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, device="cpu")
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip passes on whatever its hub client or torch raised
        raise ConfigError(
            f"backbone.pretrained: the weights {pretrained!r} of {name!r} could not be loaded "
            f"({type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}). "
            "Without a network, set backbone.pretrained to a local file of weights."
        ) from error
    return Backbone(model, preprocess, tokenizer, f"{name}/{pretrained}")


def _from_file(path: Path, directory: str | None, name: str) -> Backbone:
    if not path.is_file():
        raise ConfigError(
            f"backbone.name: there is no file {path}; give the path of a Python file with create(directory)."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"backbone.name: {path} cannot be imported as a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "create"):
        raise ConfigError(f"backbone.name: {path} has no function create(directory) -> (model, preprocess, tokenizer).")
    try:
        model, preprocess, tokenizer = module.create(directory or str(path.parent))
    except Exception as error:  # the user's own code: whatever it raises, say where
        raise ConfigError(f"backbone.name: create() of {path} failed: {type(error).__name__}: {error}") from error
    return Backbone(model, preprocess, tokenizer, name)
