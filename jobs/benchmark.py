"""Measure the platform against a straightforward port of the method, in one run, interleaved, as ratios.

    python jobs/benchmark.py --model tiny --classes 10 100 --batch 128 --rounds 5 --output docs/benchmarks

The port (diki_ray has none of it) does what the published code does: a frozen pass at every step, 77 tokens, the text
tower for every batch, one process, every cell of the accuracy matrix evaluated afresh. It is checked to give the same
losses and answers before anything is timed. Weights and images are random: speed does not depend on them.

Operations are counted as multiply-adds × 2 of the matrix products of a forward pass, plus the same again for the
gradients of the activations; frozen weights have no gradients.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from diki_ray.model.answers import Answers, answer, needed_routes
from diki_ray.model.backbone import Backbone
from diki_ray.model.gaussian import Gaussians, Moments
from diki_ray.model.methods import Diki
from diki_ray.model.module import TaskModule
from diki_ray.model.predictor import Candidates, Predictor
from diki_ray.model.residual import Parameters
from diki_ray.model.routing import Published
from diki_ray.model.training import Recipe, TaskTrainer, cosine_lr

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
    },
    "ViT-B-16": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        "quick_gelu": True,
    },
}
WORDS = ("red", "old", "small", "wooden", "glass", "wild", "north", "round", "green", "tall")


@dataclass(frozen=True, eq=False)
class World:
    """Everything that is measured on."""

    backbone: Backbone
    method: Diki
    image_size: int
    device: str

    @staticmethod
    def make(model: str, device: str) -> World:
        torch.manual_seed(0)
        config = MODELS[model]
        clip = open_clip.model.CLIP(**config)
        backbone = Backbone(clip, lambda image: image, open_clip.SimpleTokenizer(context_length=77), model)
        backbone.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        depth = min(8, backbone.image.num_blocks)
        return World(backbone, Diki(backbone, depth, 8, depth, 8), config["vision_cfg"]["image_size"], device)

    def images(self, n: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, 3, self.image_size, self.image_size, generator=generator).to(self.device)

    def names(self, n: int) -> list[str]:
        return [f"{WORDS[i % 10]} {WORDS[i // 10 % 10]} thing {i}" for i in range(n)]

    def parameters(self, seed: int, scale: float = 0.1) -> Parameters:
        generator = torch.Generator().manual_seed(seed)
        initial = self.method.initial(generator)
        return {
            n: p if n.endswith("keys") else scale * torch.randn(p.shape, generator=generator)
            for n, p in initial.items()
        }


class Port:
    """The published code's way through the same mathematics, on the same model."""

    def __init__(self, world: World):
        self.backbone, self.method = world.backbone, world.method
        self.backbone.text.active = self.backbone.image.active = None

    def text(self, tokens: Tensor, parameters: Parameters | None, weight: float = 1.0) -> Tensor:
        """All 77 tokens, through open_clip's own encode_text."""
        tower = self.backbone.text
        tower.active = None if parameters is None else self.method._residual(tower, parameters, weight)
        features = self.backbone.model.encode_text(tokens.to(self.backbone.device))
        return F.normalize(features.float(), dim=-1)

    def train_step(
        self, images: Tensor, labels: Tensor, tokens: Tensor, parameters: Parameters, optimizer: torch.optim.Optimizer
    ) -> float:
        with torch.no_grad():
            self.backbone.encode_image(images)  # the frozen pass that the published code makes at each step
        features = self.method.image_features(images, parameters)
        loss = F.cross_entropy(self.backbone.logits(features, self.text(tokens, parameters)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate_batch(self, images: Tensor, predictor: Predictor, tokens: Tensor, learnt: int) -> Tensor:
        """Answers of one batch under the vote: frozen pass, densities, residual pass, text tower; nothing is kept."""
        frozen = predictor.frozen_features(images)
        routes = predictor.route(predictor.log_density(frozen), "batch", range(learnt))
        features = predictor.image_features(images, frozen, routes)
        text = self.text(tokens, predictor._parameters[int(routes.task[0])], float(routes.text_weight[0]))
        return self.backbone.logits(features, text.cpu()).argmax(1)


def timed(device: str, act: Callable[[], Any]) -> float:
    """Seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(device: str, rounds: int, **acts: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each act over rounds, one after the other in every round: a noisy machine meets all alike."""
    for act in acts.values():
        act()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            seconds[name].append(timed(device, act))
    return {name: statistics.median(values) for name, values in seconds.items()}


def training(world: World, num_classes: int, batch: int, rounds: int) -> dict[str, Any]:
    """Steps of one task: ours against the port, on the same images, labels and initial prompts."""
    template = "a photo of a {}."
    tokens = world.backbone.tokenize(world.names(num_classes), template).to(world.device)
    images, labels = world.images(batch), (torch.arange(batch) % num_classes).to(world.device)
    initial = world.parameters(0)
    port = Port(world)

    ported = {n: p.clone().to(world.device).requires_grad_() for n, p in initial.items()}
    optimizer = torch.optim.SGD(list(ported.values()), lr=1.0)
    ours = TaskTrainer(world.method, tokens, Recipe(lr=1.0), num_steps=10_000_000, parameters=initial)
    losses: list[tuple[float, float]] = []
    for step in range(3):
        optimizer.param_groups[0]["lr"] = cosine_lr(step, 10_000_000, 1.0)
        losses.append((ours.step(images, labels).loss, port.train_step(images, labels, tokens, ported, optimizer)))
    difference = max(abs(a - b) for a, b in losses)
    allowed = 1e-4 if world.device == "cpu" else 5e-2  # bfloat16
    if difference > allowed:
        raise SystemExit(f"the port and the platform do not compute the same losses: {losses}")

    seconds = interleaved(
        world.device,
        rounds,
        ours=lambda: ours.step(images, labels),
        port=lambda: port.train_step(images, labels, tokens, ported, optimizer),
        text=lambda: ours.class_features(),
    )
    gflop = training_gflop(world, num_classes, batch, int(world.backbone._needed_length(tokens)))
    return {
        "classes": num_classes,
        "batch": batch,
        "ours_images_per_s": batch / seconds["ours"],
        "port_images_per_s": batch / seconds["port"],
        "ratio": seconds["port"] / seconds["ours"],
        "text_forward_share": seconds["text"] / seconds["ours"],
        "loss_difference": difference,
        "tflop_per_s": gflop / seconds["ours"] / 1e3,
    }


def training_gflop(world: World, num_classes: int, batch: int, num_tokens: int) -> float:
    """Forward plus gradients of activations, of both towers; see the module's docstring."""

    def tower(width: int, layers: int, length: int, rows: int) -> float:
        per_token = layers * (12 * width**2 + 2 * length * width)  # projections and MLP, the two attention products
        return 2.0 * rows * length * per_token

    visual = world.backbone.model.visual
    length = visual.positional_embedding.shape[0]
    image = tower(world.backbone.image.width, world.backbone.image.num_blocks, length, batch)
    text = tower(world.backbone.text.width, world.backbone.text.num_blocks, num_tokens, num_classes)
    return 2 * (image + text) / 1e9


def matrix_throughput(device: str, rounds: int) -> float:
    """TFLOP/s of a large product in the dtype used, as this device does it now."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    seconds = interleaved(device, rounds, product=lambda: a @ b)["product"]
    return 2 * n**3 / seconds / 1e12


def stream(world: World, num_tasks: int, num_classes: int, images_per_task: int, rounds: int) -> dict[str, Any]:
    """The whole accuracy matrix of a stream: one pass with answers kept, against each cell afresh."""
    modules, candidates, tokens = [], [], []
    for t in range(num_tasks):
        images = world.images(96, seed=100 + t) + 2 * world.images(1, seed=500 + t)  # a domain of its own
        with torch.no_grad():
            features = world.backbone.encode_image(images).cpu()
        names = [f"{name} {t}" for name in world.names(num_classes)]
        modules.append(
            TaskModule(
                str(t), str(t), tuple(names), ("a photo of a {}.",), "diki",
                {n: p.numpy() for n, p in world.parameters(t).items()}, Moments.of(features), features[:64].numpy(),
            )
        )  # fmt: skip
        candidates.append(Candidates.of(world.backbone, names, ["a photo of a {}."]))
        tokens.append(world.backbone.tokenize(names, "a photo of a {}."))
    tests = [world.images(images_per_task, seed=900 + t) + 2 * world.images(1, seed=500 + t) for t in range(num_tasks)]
    gaussians = Gaussians([m.moments for m in modules], shrinkage="oas")
    scale = float(world.backbone.embed_dim)
    port = Port(world)

    def predictor() -> Predictor:
        return Predictor(world.method, modules, gaussians, Published(scale), text_grid=33)

    def once() -> None:
        mine = predictor()
        for j, images in enumerate(tests):
            features = mine.frozen_features(images)
            known = Answers.empty(np.zeros(len(images)), num_tasks, 1)
            densities = mine.log_density(features)
            known.log_density[:] = densities.numpy()
            for t in range(num_tasks):
                column = torch.full((len(images),), t)
                known.weight[:, t] = mine.calibration.weight(densities[:, t], column).numpy()
            needed = needed_routes(known.log_density, [range(num_tasks)])
            answer(mine, images, features, known, [candidates[j]], needed)

    def afresh() -> None:
        mine = predictor()
        for learnt in range(1, num_tasks + 1):
            for j, images in enumerate(tests):
                port.evaluate_batch(images, mine, tokens[j], learnt)

    seconds = interleaved(world.device, rounds, ours=once, port=afresh)
    answered = num_tasks * images_per_task
    return {
        "tasks": num_tasks,
        "classes": num_classes,
        "images_per_task": images_per_task,
        "ours_s": seconds["ours"],
        "port_s": seconds["port"],
        "ratio": seconds["port"] / seconds["ours"],
        "ours_test_images_per_s": answered / seconds["ours"],
    }


def evaluation(world: World, num_classes: int, batch: int, rounds: int) -> dict[str, Any]:
    """One test batch with one task learnt, class tables warm, against the port; the same votes, the same answers."""
    images = world.images(batch)
    with torch.no_grad():
        features = world.backbone.encode_image(images).cpu()
    names = world.names(num_classes)
    module = TaskModule(
        "0", "0", tuple(names), ("a photo of a {}.",), "diki",
        {n: p.numpy() for n, p in world.parameters(1).items()}, Moments.of(features), features[:64].numpy(),
    )  # fmt: skip
    candidates = Candidates.of(world.backbone, names, ["a photo of a {}."])
    tokens = world.backbone.tokenize(names, "a photo of a {}.")
    gaussians = Gaussians([module.moments], shrinkage="oas")
    predictor = Predictor(world.method, [module], gaussians, Published(float(world.backbone.embed_dim)), text_grid=33)
    port = Port(world)

    def ours(routing: Any = "image", kept: Tensor | None = None) -> Tensor:
        frozen = predictor.frozen_features(images) if kept is None else kept
        routes = predictor.route(predictor.log_density(frozen), routing)
        return predictor.logits(images, frozen, routes, candidates).argmax(1)

    same = (ours("batch") == port.evaluate_batch(images, predictor, tokens, 1)).float().mean().item()
    if same < (1.0 if world.device == "cpu" else 0.98):
        raise SystemExit(f"the port and the platform answer differently: {same:.3f} the same")
    kept = predictor.frozen_features(images)
    seconds = interleaved(
        world.device,
        rounds,
        first=ours,
        again=lambda: ours(kept=kept),
        port=lambda: port.evaluate_batch(images, predictor, tokens, 1),
    )
    return {
        "classes": num_classes,
        "batch": batch,
        "ours_images_per_s": batch / seconds["first"],
        "ours_features_kept_images_per_s": batch / seconds["again"],
        "port_images_per_s": batch / seconds["port"],
        "ratio": seconds["port"] / seconds["first"],
        "ratio_features_kept": seconds["port"] / seconds["again"],
    }


def routing(world: World, num_tasks: int, batch: int, rounds: int) -> dict[str, Any]:
    """Densities of many synthetic tasks beside the image tower's time for the same images."""
    rng = np.random.default_rng(0)
    e = world.backbone.embed_dim
    basis = rng.normal(size=(2 * e, e)) / e**0.5
    moments = [Moments.of(basis + rng.normal(size=e)) for _ in range(num_tasks)]
    gaussians = Gaussians(moments, shrinkage="oas")
    images = world.images(batch)
    features = world.backbone.encode_image(images).detach().cpu()
    seconds = interleaved(
        world.device,
        rounds,
        densities=lambda: gaussians.log_density(features),
        tower=lambda: world.backbone.encode_image(images),
    )
    return {
        "tasks": num_tasks,
        "batch": batch,
        "share_of_image_tower": seconds["densities"] / seconds["tower"],
        "factor_bytes": gaussians.num_bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 397])
    parser.add_argument("--batch", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tasks", type=int, default=11, help="of the stream whose matrix is evaluated; 0 leaves it out"
    )
    parser.add_argument("--routing-tasks", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", metavar="FILE.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU on this machine.", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    world, rounds = World.make(arguments.model, arguments.device), arguments.rounds
    peak = matrix_throughput(arguments.device, rounds)
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "versions": {
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "python": platform.python_version(),
        },
        "model": arguments.model,
        "matrix_tflop_per_s": peak,
        "training": [training(world, c, b, rounds) for c in arguments.classes for b in arguments.batch],
        "evaluation": [evaluation(world, c, b, rounds) for c in arguments.classes for b in arguments.batch],
        "routing": [routing(world, t, arguments.batch[0], rounds) for t in arguments.routing_tasks],
    }
    for row in report["training"]:
        row["fraction_of_matrix_throughput"] = row["tflop_per_s"] / peak
    if arguments.tasks:
        report["stream"] = [stream(world, arguments.tasks, 20, arguments.batch[0], max(1, rounds // 3))]
    report["peak_memory_bytes"] = (
        torch.cuda.max_memory_allocated()
        if arguments.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    show(report)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report, indent=1))
    return 0


def show(report: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{report['model']} on {report['machine']}, {report['threads']} threads, {report['date']}", highlight=False
    )
    for section in ("training", "evaluation", "stream", "routing"):
        if rows := report.get(section):
            table = Table(title=section, title_justify="left")
            for column in rows[0]:
                table.add_column(column.replace("_", " "), justify="right")
            for row in rows:
                table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
            console.print(table)


if __name__ == "__main__":
    sys.exit(main())
