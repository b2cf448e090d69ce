"""Pre-train the embedded tiny CLIP on the embedded world.

    python jobs/pretrain.py --output diki_ray/assets/tiny_clip

writes a complete backbone folder and prints its zero-shot table. The pairs are drawn once into memory (about 7 KB each)
and augmented anew in each epoch: drawing costs a quarter of a training step, and the towers forget single pictures
quickly at this size. Seeded throughout; two runs on one machine agree, another machine rounds differently.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from diki_ray.assets.tiny_clip import create as backbone
from diki_ray.data.world import tasks as world

# Pairs drawn by one call in a drawing process.
_DRAWING_CHUNK = 2000
# Tokens of a caption or prompt, start and end included: about one caption in 700 is cut.
_CONTEXT_LENGTH = 20
# CLIP's own bound on exp(logit_scale), as a logarithm.
_MAX_LOGIT_SCALE = math.log(100)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="backbone folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, weights, order and augmentation")
    parser.add_argument("--num-pairs", type=int, default=100_000, help="pairs drawn")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the pairs")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak, AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=128, help="of both towers, a multiple of 32")
    parser.add_argument("--image-layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--embed-dim", type=int, default=64, help="of the shared embedding")
    parser.add_argument("--num-merges", type=int, default=4000, help="byte-pair merges kept from open_clip's list")
    parser.add_argument("--num-threads", type=int, default=2, help="of torch, and drawing processes")
    parser.add_argument("--max-minutes", type=float, default=None, help="stop training early (the schedule is cut)")
    parser.add_argument("--no-table", action="store_true", help="skip the zero-shot table")
    return parser.parse_args(arguments)


def architecture(options: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Arguments of `open_clip.model.CLIP`, as stored in the folder's config file."""
    return {
        "embed_dim": options.embed_dim,
        "vision_cfg": {
            "image_size": world.IMAGE_SIZE_PX,
            "patch_size": 8,
            "width": options.width,
            "head_width": 32,
            "layers": options.image_layers,
        },
        "text_cfg": {
            "context_length": _CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": options.width,
            "heads": options.width // 32,
            "layers": options.text_layers,
        },
    }


def write_merges(path: Path, num_merges: int) -> None:
    """The first merges of open_clip's vocabulary: any text stays encodable, the embedding table stays small."""
    with gzip.open(open_clip.tokenizer.default_bpe()) as file:
        lines = file.read().decode("utf-8").split("\n")[: num_merges + 1]
    # No time stamp in the header: the same list is the same bytes.
    path.write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))


# --- Pairs --------------------------------------------------------------------------------------------------------


def _draw(seed: int, start: int, stop: int) -> tuple[np.ndarray, list[str]]:
    pairs = [world.pretraining_pair(seed, index) for index in range(start, stop)]
    return np.stack([np.asarray(picture) for picture, _ in pairs]), [caption for _, caption in pairs]


def draw_pairs(seed: int, num_pairs: int, num_processes: int) -> tuple[torch.Tensor, list[str]]:
    """All pictures as uint8 `[num_pairs, 3, side, side]`, and their captions; the same for any number of processes."""
    starts = range(0, num_pairs, _DRAWING_CHUNK)
    stops = [min(start + _DRAWING_CHUNK, num_pairs) for start in starts]
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("fork")) as pool:
        chunks = list(pool.map(_draw, [seed] * len(starts), starts, stops))
    pictures = torch.from_numpy(np.concatenate([pictures for pictures, _ in chunks]))
    return pictures.permute(0, 3, 1, 2).contiguous(), [caption for _, captions in chunks for caption in captions]


def augmented(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 `[B, 3, H, W]` to normalised float32, each picture moved, turned, scaled and recoloured a little."""
    num = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=generator)

    angle, scale = uniform(-0.15, 0.15), uniform(0.85, 1.2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = uniform(-0.12, 0.12), uniform(-0.12, 0.12)
    matrices = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], 1).view(num, 2, 3)
    grid = F.affine_grid(matrices, list(pictures.shape), align_corners=False)
    values = pictures.float().div(127.5).sub(1)
    values = F.grid_sample(values, grid, padding_mode="reflection", align_corners=False)
    # Towards gray, but rarely so far that a colour loses its name.
    values = torch.lerp(values.mean(1, keepdim=True), values, uniform(0.35, 1.0, 1, 1, 1))
    values = values * uniform(0.6, 1.1, 1, 1, 1) + uniform(-0.25, 0.25, 1, 1, 1)
    noise = torch.randn(values.shape, generator=generator) * uniform(0.0, 0.12, 1, 1, 1)
    return (values + noise).clamp(-1, 1)


# --- Training -----------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices only: shrinking gains, biases or the logit scale changes what they are for."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


def batches(num_pairs: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Index tensors of full batches; a short rest at an epoch's end is left out, as fewer negatives bias the loss."""
    for _ in range(epochs):
        order = torch.randperm(num_pairs, generator=generator)
        for start in range(0, num_pairs - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def train(model: Any, pictures: torch.Tensor, tokens: torch.Tensor, options: argparse.Namespace) -> list[float]:
    """Contrastive training of the CLIP (open_clip is untyped) in place; the losses of all steps."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), fused=True, betas=(0.9, 0.98), eps=1e-6
    )
    contrastive = ClipLoss()
    num_steps = options.epochs * (len(pictures) // options.batch_size)
    started, losses = time.monotonic(), []
    for step, chosen in enumerate(batches(len(pictures), options.batch_size, options.epochs, generator)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, options.warmup_steps, options.learning_rate)
        # One caption often occurs twice in a batch; its features are computed once.
        texts, which = tokens[chosen].unique(dim=0, return_inverse=True)
        image_features = model.encode_image(augmented(pictures[chosen], generator), normalize=True)
        text_features = model.encode_text(texts, normalize=True)[which]
        loss = contrastive(image_features, text_features, model.logit_scale.exp())
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss.item()} at step {step}: lower --learning-rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)
        losses.append(loss.item())
        elapsed_s = time.monotonic() - started
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            rate = (step + 1) * options.batch_size / elapsed_s
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step + 1}/{num_steps}  loss {recent:.3f}  {rate:.0f} pairs/s  {elapsed_s:.0f} s", flush=True)
        if options.max_minutes is not None and elapsed_s > 60 * options.max_minutes:
            print(f"stopped at step {step + 1}: --max-minutes {options.max_minutes}", flush=True)
            break
    return losses


def save(model: nn.Module, config: dict[str, Any], directory: Path) -> None:
    """The folder's weights in half precision, its config, and the code that loads both."""
    (directory / backbone.CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / backbone.WEIGHTS_FILE)
    code = Path(backbone.__file__)
    if code.parent.resolve() != directory.resolve():
        shutil.copyfile(code, directory / code.name)


# --- What came of it ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def zero_shot_accuracy(loaded: tuple[Any, Any, Any], task: world.WorldTask, split: str) -> float:
    """Share of a split's images whose best class name, in the task's template, is their own."""
    model, preprocess, tokenizer = loaded
    prompts = [task.template.format(name) for name in task.class_names]
    text_features = model.encode_text(tokenizer(prompts), normalize=True)
    images, labels = zip(*((preprocess(image), label) for image, label in world.samples(task.name, split)), strict=True)
    image_features = model.encode_image(torch.stack(images), normalize=True)
    return ((image_features @ text_features.T).argmax(1) == torch.tensor(labels)).float().mean().item()


def zero_shot_table(directory: Path) -> str:
    """Markdown table of the stored backbone's zero-shot accuracy in percent."""
    loaded = backbone.create(directory)
    lines = ["| task | chance | zero-shot, val | zero-shot, test |", "|---|---|---|---|"]
    for task in world.TASKS.values():
        chance = 100 / len(task.class_names)
        val, test = (100 * zero_shot_accuracy(loaded, task, split) for split in ("val", "test"))
        lines.append(f"| {task.name} | {chance:.1f} | {val:.1f} | {test:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the job; the losses of all steps."""
    options = parse_arguments(arguments)
    if options.num_pairs < options.batch_size:
        raise ValueError(f"--num-pairs {options.num_pairs} is below --batch-size {options.batch_size}")
    started = time.monotonic()
    pictures, captions = draw_pairs(options.seed, options.num_pairs, options.num_threads)
    print(f"{len(captions)} pairs drawn in {time.monotonic() - started:.0f} s", flush=True)

    torch.set_num_threads(options.num_threads)
    torch.manual_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    write_merges(options.output / backbone.MERGES_FILE, options.num_merges)
    merges = str(options.output / backbone.MERGES_FILE)
    tokenizer = open_clip.SimpleTokenizer(bpe_path=merges, context_length=_CONTEXT_LENGTH)
    config = architecture(options, tokenizer.vocab_size)
    model = backbone.build(config)
    losses = train(model.train(), pictures, tokenizer(captions), options)
    save(model, config, options.output)
    if not options.no_table:
        print(zero_shot_table(options.output))
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes; torch {torch.__version__}")
    return losses


if __name__ == "__main__":
    main()
