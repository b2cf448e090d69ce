"""The frozen CLIP: any open_clip model whose two towers are transformers of a known attention (docs/backbones.md).

A backbone is one of
* `embedded`: the tiny CLIP that ships with the package;
* an open_clip name with its weights (`ViT-B-16`, `openai`, or a local file instead of the tag);
* `local-dir:FOLDER`: open_clip's `open_clip_config.json`, weights and tokenizer files in one folder;
* a Python file with `create(directory) -> (model, preprocess, tokenizer)`, for in-house CLIPs.

Shapes: B images, C texts, L tokens, E embedding dimensions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diki_ray.clip.attention import TorchAttention, attention_blocks
from diki_ray.clip.light_import import import_whole, needs_whole, open_clip
from diki_ray.clip.packing import TEXTS_A_ROW, packed
from diki_ray.clip.readout import read_alone, reads_class_token
from diki_ray.clip.remote_code import no_remote_code, refuse_trusting
from diki_ray.clip.residual import Residual, Tower
from diki_ray.config.places import LOCAL
from diki_ray.errors import ConfigError

EMBEDDED = Path(__file__).parent.parent / "assets" / "tiny_clip" / "create.py"


class Backbone:
    """A frozen CLIP with a residual branch's place in both towers.

    Raises:
        ConfigError: a tower without a stack of blocks of one known attention each (ResNet, ConvNeXt, Swin).
    """

    def __init__(self, model: nn.Module, preprocess: Callable[[Any], Tensor], tokenizer: Callable, name: str = "model"):
        self.name = name
        self.model: Any = model.eval().requires_grad_(False)  # Any: open_clip is untyped
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self._text: Any = getattr(model, "text", model)
        """Owner of the text tower: open_clip's `CLIP` has its parts on itself, its other models in a module."""
        self.image = _tower("image", getattr(model, "visual", None), name)
        self.text = _tower("text", getattr(model, "transformer", None) if self._text is model else self._text, name)
        if reads_class_token(getattr(model, "visual", None)):
            read_alone(self.image)
        read_alone(self.text)
        self.embed_dim: int = self._embed_dim()
        self.texts_a_row = TEXTS_A_ROW
        self._digest_as_loaded: str | None = None
        self.start_pass: Callable[[], None] | None = None
        """Called before every pass, where the weights are shared out to all workers (`clip/sharded.py`)."""

    def _embed_dim(self) -> int:
        if self._text is not self.model:
            return self._text.output_dim
        projection = self.model.text_projection
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[-1]

    @property
    def towers(self) -> tuple[Tower, Tower]:
        return self.image, self.text

    @property
    def in_lockstep(self) -> bool:
        """Whether every worker must make the same passes, also those for which it has no images or texts."""
        return self.start_pass is not None

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        weights = self.image.attentions[0].module.parameters()
        return next(p.dtype for p in weights if len(getattr(p, "ds_shape", p.shape)) > 1)  # shared out, they are empty

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Backbone:
        """Moves the model and stores its weights as dtype, but for the logits' scale and bias, which stay float32.
        Layer norms still compute in float32; of their weights CUDA wants the dtype of what they normalise."""
        self.model.to(device)
        if dtype is not torch.float32:
            self._digest_as_loaded = self.digest()
            kept = {n: p.data for n, p in self.model.named_parameters() if n in ("logit_scale", "logit_bias")}
            self.model.to(dtype)
            for name, data in kept.items():
                self.model.get_parameter(name).data = data
        return self

    @property
    def _is_native(self) -> bool:
        """Both towers are open_clip's own with torch's attention, in one `CLIP`."""
        torchs = all(isinstance(tower.attentions[0], TorchAttention) for tower in self.towers)
        return torchs and self._text is self.model

    def compile(self, backend: str = "inductor", mode: str | None = None) -> Backbone:
        """Both towers through torch.compile, in place; each new length of text compiles once more, up to two."""
        for tower in (self.model.visual, self._text.transformer):
            tower.compile(backend=backend, mode=mode)
        return self

    def encode_image(self, images: Tensor, residual: Residual | None = None) -> Tensor:
        """L2-normalised features [B, E] float32 of images [B, 3, H, W]; with a residual, under it."""
        if self.start_pass is not None:
            self.start_pass()
            if not len(images):
                height, width = _pair(self.model.visual.image_size)
                return self.encode_image(torch.zeros(1, 3, height, width), residual)[:0]
        self.image.begin(residual, torch.zeros(len(images), 1, dtype=torch.long, device=self.device))
        features = self.model.encode_image(images.to(self.device, self.dtype))
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, tokens: Tensor, residual: Residual | None = None) -> Tensor:
        """L2-normalised features [C, E] float32 of tokens [C, L]; with a residual, under it.

        Tokens after the longest text's end are cut off where they change nothing (`trimming`), and a beginning that
        all texts share is computed once for several (packing.py), both exact to float32 rounding.
        """
        if self.start_pass is not None:
            self.start_pass()
            if not len(tokens):
                return self.encode_text(tokens.new_zeros(1, tokens.shape[1]), residual)[:0]
        tokens = tokens[:, : self._needed_length(tokens)]
        if self.trimming == "end of text":
            return F.normalize(self._encode_causal_text(tokens, residual).float(), dim=-1)
        self.text.active = residual
        return F.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)

    def _encode_causal_text(self, tokens: Tensor, residual: Residual | None) -> Tensor:
        """open_clip's forward pass of a text tower, which refuses inputs shorter than its context."""
        text, alike = self._text, residual is None or residual.same_for_all
        rows = packed(tokens, self._ends(tokens), self.texts_a_row if alike else 1)
        positions, ends = rows.positions.to(self.device), rows.ends.to(self.device)
        mask = text.attn_mask[positions][:, positions].masked_fill(~rows.visible.to(self.device), -torch.inf)
        alone = self.text.begin(residual, ends)
        x = text.token_embedding(rows.tokens.to(self.device)).to(self.dtype)
        x = x + text.positional_embedding[positions].to(x.dtype)
        x = text.ln_final(text.transformer(x, attn_mask=mask))
        x = x if alone else x[torch.arange(len(x), device=x.device)[:, None], ends]
        x = x.flatten(0, 1)[: len(tokens)]
        projection = text.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    @cached_property
    def trimming(self) -> Literal["end of text", "padding", "off"]:
        """After what tokens change no feature: after the end of text where attention is causal and the feature is read
        there; in the padding where it is masked (Hugging Face towers); off: nowhere, all tokens are computed."""
        if isinstance(self._text, open_clip.model.HFTextEncoder):
            return "padding"
        mask = getattr(self._text, "attn_mask", None)
        if mask is None or getattr(self._text, "cls_emb", None) is not None:
            return "off"
        later = torch.ones_like(mask, dtype=torch.bool).triu(1)
        causal = bool(torch.isneginf(mask[later]).all())
        return "end of text" if causal and _pooling(self._text)[0] in ("argmax", "eos") else "off"

    def _needed_length(self, tokens: Tensor) -> int:
        if self.trimming == "off":
            return tokens.shape[1]
        if self.trimming == "padding":
            used = (tokens != self._text.config.pad_token_id).any(0).nonzero()
            return int(used.max()) + 1 if len(used) else tokens.shape[1]
        return int(self._ends(tokens).max()) + 1

    def _ends(self, tokens: Tensor) -> Tensor:
        """int64 [C]: where each text ends, and its feature is read."""
        pool_type, eos = _pooling(self._text)
        return tokens.argmax(-1) if pool_type == "argmax" else (tokens == eos).int().argmax(-1)

    def tokenize(self, class_names: Sequence[str], template: str) -> Tensor:
        """Token ids [C, L] of the class names in the template; underscores in names become spaces."""
        return self.tokenizer([template.format(name.replace("_", " ")) for name in class_names])

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """exp(logit_scale) · f_img f_txtᵀ [B, C], plus logit_bias where the model has one (SigLIP; a constant, which
        changes no softmax); text features [C, E], or [B, C, E] where each image has its own. They are on one device,
        the model's or the CPU."""
        scale = self.model.logit_scale.exp().float().to(image_features.device)
        if text_features.dim() == 3:
            logits = scale * torch.einsum("be,bce->bc", image_features, text_features)
        else:
            logits = scale * image_features @ text_features.T
        bias = getattr(self.model, "logit_bias", None)
        return logits if bias is None else logits + bias.float().to(logits.device)

    def digest(self) -> str:
        """sha256 over every weight, the image preprocessing and the architecture; of weights that `to` rounded, as they
        were before, so that one backbone has one digest at every precision."""
        if self._digest_as_loaded is not None:
            return self._digest_as_loaded
        h = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            h.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            h.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        addresses = r" at 0x[0-9a-f]+"  # of functions differ by process
        preprocess = re.sub(addresses, "", repr(self.preprocess))
        heads = [tower.attentions[0].heads for tower in self.towers]
        if self._is_native:
            activation = type(self.model.transformer.resblocks[0].mlp[1]).__name__
            h.update(f"{activation} {heads} {self.model.text_pool_type} {preprocess}".encode())
        else:
            architecture = re.sub(addresses, "", repr(self.model))
            h.update(f"{architecture} {heads} {_pooling(self._text)} {self.trimming} {preprocess}".encode())
        return h.hexdigest()


def _pooling(text: Any) -> tuple[Any, Any]:
    """(how a text tower pools, its end-of-text token)."""
    prefix = "" if hasattr(text, "pool_type") else "text_"
    return getattr(text, f"{prefix}pool_type", None), getattr(text, f"{prefix}eos_id", None)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tower(tower: str, root: nn.Module | None, name: str) -> Tower:
    blocks = [] if root is None else attention_blocks(root)
    if not blocks:
        names = {type(m).__name__ for m in root.modules()} if root else set()
        others = {n for n in names if "Attention" in n and "Block" not in n and "Pool" not in n}
        raise ConfigError(
            f"backbone {name!r}: its {tower} tower has no stack of blocks with one attention of a known kind each"
            + (f" (it has {', '.join(sorted(others))})" if others else "")
            + ", and the residual branch needs them; choose a ViT CLIP such as ViT-B-16, ViT-B-16-SigLIP or EVA02-B-16."
        )
    return Tower(tower, blocks)


def load(name: str, pretrained: str | None = None, directory: str | None = None) -> Backbone:
    """The backbone of that name on the CPU in float32, ready to be frozen beside.

    Args:
        name: `embedded`, an open_clip model name, `local-dir:FOLDER`, or the path of a Python file with
            `create(directory)`.
        pretrained: open_clip's tag of the weights, or a local file with them; unused with `local-dir:`.
        directory: of a Python file: given to `create`, the file's own folder by default; of an open_clip model whose
            tokenizer is Hugging Face's: a folder with the tokenizer's files, instead of a download.

    Raises:
        ConfigError: no such name, file, weights or tokenizer, or a tower without a known attention.
    """
    if name == "embedded":
        return _from_file(EMBEDDED, None, name)
    if name.endswith(".py"):
        return _from_file(Path(name).expanduser(), directory, name)
    is_folder = name.startswith(LOCAL)
    if not is_folder and name not in open_clip.list_models():
        raise ConfigError(
            f"backbone.name: {name!r} is neither `embedded`, nor a Python file, nor {LOCAL}FOLDER, nor one of "
            f"open_clip's models (such as ViT-B-16, ViT-L-14; `open_clip.list_models()` has them all)."
        )
    if pretrained is None and not is_folder:
        raise ConfigError(f"backbone.pretrained: {name!r} needs weights: a tag such as `openai`, or a local file.")
    if is_folder or needs_whole(name):
        import_whole()
    if is_folder:
        refuse_trusting(Path(name.removeprefix(LOCAL)))
    try:
        with no_remote_code():
            model, preprocess = open_clip.create_model_from_pretrained(
                name, pretrained=pretrained, device="cpu", weights_only=True
            )
    except ConfigError:
        raise
    except Exception as error:  # open_clip passes on whatever its hub client or torch raised
        what = (
            f"backbone.name: {name!r}" if is_folder else f"backbone.pretrained: the weights {pretrained!r} of {name!r}"
        )
        raise ConfigError(f"{what} could not be loaded ({_first_line(error)}). {_without_network(name)}") from error
    return Backbone(model, preprocess, _tokenizer(name, directory), name if is_folder else f"{name}/{pretrained}")


def _without_network(name: str) -> str:
    if name.startswith(LOCAL):
        return "The folder needs open_clip_config.json and the weights beside it (open_clip_model.safetensors)."
    if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]:
        return f"Its text tower is Hugging Face's: without a network use {LOCAL}FOLDER, see docs/backbones.md."
    return "Without a network, set backbone.pretrained to a local file of weights."


def _tokenizer(name: str, directory: str | None) -> Callable:
    """open_clip's tokenizer of the model; Hugging Face's tokenizer files come from `directory` if it is given."""
    config = {} if name.startswith(LOCAL) else open_clip.get_model_config(name)["text_cfg"]
    try:
        with no_remote_code():
            if directory is None or "hf_tokenizer_name" not in config:
                return open_clip.get_tokenizer(name)
            return open_clip.tokenizer.HFTokenizer(
                directory,
                context_length=config.get("context_length", 77),
                tokenizer_mode=config.get("tokenizer_mode"),
                **config.get("tokenizer_kwargs", {}),
            )
    except ConfigError:
        raise
    except Exception as error:  # likewise
        raise ConfigError(
            f"backbone {name!r}: its tokenizer {config.get('hf_tokenizer_name', '')!r} could not be loaded "
            f"({_first_line(error)}). It needs `pip install 'diki-ray[hf]'`, and without a network its files "
            "(tokenizer.json, tokenizer_config.json) in a local folder: set backbone.directory to it."
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _from_file(path: Path, directory: str | None, name: str) -> Backbone:
    if not path.is_file():
        raise ConfigError(
            f"backbone.name: there is no file {path}; give the path of a Python file with create(directory)."
        )
    if path != EMBEDDED:
        import_whole()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"backbone.name: {path} cannot be imported as a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises, say where
        raise ConfigError(f"backbone.name: {path} cannot be imported ({_first_line(error)}).") from error
    if not callable(getattr(module, "create", None)):
        raise ConfigError(f"backbone.name: {path} has no function create(directory) -> (model, preprocess, tokenizer).")
    try:
        model, preprocess, tokenizer = module.create(directory or str(path.parent))
    except Exception as error:  # the user's own code: whatever it raises, say where
        raise ConfigError(f"backbone.name: create() of {path} failed: {_first_line(error)}") from error
    return Backbone(model, preprocess, tokenizer, name)
