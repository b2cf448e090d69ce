"""The README.md beside an exported bundle: what the model is, how to load it, what it was measured to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diki_ray.clip.trust import needs_word
from diki_ray.config import BackboneSection
from diki_ray.learning.methods import METHODS

MAX_CLASSES_SHOWN = 30
MEANINGS = {
    "transfer": "mean accuracy on tasks not learnt yet",
    "average": "mean accuracy over the whole stream",
    "last": "mean accuracy once all is learnt",
    "forgetting": "best accuracy a task ever had, less its last",
}


def model_card(content: Mapping[str, Any], num_bytes: int, results: Mapping[str, Any] | None) -> str:
    """Markdown of a bundle's header, with the figures of the run's results.json where there is one."""
    config, backbone = content["config"], content["backbone"]
    headers = [m["header"] for m in content["modules"]]
    method = METHODS[config["method"]["name"]]
    classes = sum(len(h["class_names"]) for h in headers)
    parts = [
        "---",
        "library_name: diki_ray",
        "pipeline_tag: zero-shot-image-classification",
        f"tags: [clip, continual-learning, {headers[0]['method']}]",
        "---",
        "",
        f"# {_text(content['run'])}",
        "",
        f"A frozen CLIP (`{_code(backbone['name'])}`) that has learnt {len(headers)} tasks with {classes} classes, one "
        f"after another, with {method.described(config['method'])}.",
        "",
        "## Use",
        "",
        "```python",
        "import diki_ray",
        "",
        _load_line(BackboneSection.model_validate(config["backbone"])),
        'for answer in model.predict(["photo.jpg"]):',
        "    print(answer.class_name, answer.confidence, answer.task, answer.weight)",
        'model.predict(["photo.jpg"], classes=["any", "class", "names"])  # open vocabulary',
        "```",
        "",
        "## What it has learnt",
        "",
        "| task | classes | training images | template |",
        "|---|---|---|---|",
        *(_task_row(h) for h in headers),
        "",
        *_figures(results, [m["digest"] for m in content["modules"]]),
        "## What is inside",
        "",
        f"* `bundle.safetensors`: {num_bytes:,} bytes, written by diki_ray {content['diki_ray']}; each module is "
        "verified against its sha256 when it is loaded.",
        f"* Backbone: `{_code(backbone['name'])}`, {backbone['embed_dim']} dimensions, digest "
        f"`{backbone['digest'][:16]}…`; not inside, and another one is refused.",
        f"* {_how_it_answers(config, method.answering)} Seed {config['run']['seed']}; `config.yaml` has all settings.",
        *(
            f"* Task {_text(h['task'])} was imported: {_text(h['provenance']['imported']['format'])}."
            for h in headers
            if "imported" in h["provenance"]
        ),
        "",
        "## Limits",
        "",
        "* It chooses among the classes it is asked about; an image of none of them gets one of them all the same.",
        *(
            ["* Routing is by the look of an image. Tasks that look alike are confused with each other."]
            if method.answering == "routed"
            else []
        ),
        "* It holds counts, means and second moments of its training images' features, no images. The mean of a class "
        "with a single image is that image's features.",
        "* What the backbone has learnt from its pre-training data, biases included, is all still there.",
        "",
    ]
    return "\n".join(parts)


def _how_it_answers(config: Mapping[str, Any], answering: str) -> str:
    if answering == "classes":
        return "The class model answers, from class counts, class means and second moments; nothing was trained."
    if answering != "routed":
        return "Images are not routed."
    if config["routing"]["density"] == "task":
        return (
            f"Images are routed by one Gaussian a task, calibration `{config['calibration']['form']}`, shrinkage "
            f"`{config['statistics']['shrinkage']}`."
        )
    beside = config["class_model"]["beside_modules"]
    head = f"; the answer is the mean of its logits, with the weight {beside:g}, and the module's own" if beside else ""
    return f"Images are routed and modules weighed by the class model{head}."


def _load_line(backbone: BackboneSection) -> str:
    if needs_word(backbone):
        word = load_arguments(backbone).replace("`", "'")
        return f'model = diki_ray.load("this/folder", {word})  # your own word for a backbone of files on your machine'
    return 'model = diki_ray.load("this/folder")  # no cluster, no storage; the backbone\'s weights are fetched by name'


def load_arguments(backbone: BackboneSection) -> str:
    """The arguments of `diki_ray.load` that name this backbone, as they are typed."""
    named = {"backbone": backbone.name, "pretrained": backbone.pretrained, "directory": backbone.directory}
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in named.items() if value is not None)


def _task_row(header: Mapping[str, Any]) -> str:
    names = [_text(name) for name in header["class_names"][:MAX_CLASSES_SHOWN]]
    more = len(header["class_names"]) - len(names)
    shown = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    count = "not known" if "imported" in header["provenance"] else f"{header['count']:,}"
    return f"| {_text(header['task'])} | {shown} | {count} | {_text(header['templates'][0])} |"


def _figures(results: Mapping[str, Any] | None, digests: Sequence[str]) -> list[str]:
    """Figures count only where they were measured with exactly these modules."""
    if results is None:
        return ["## Figures", "", "None: the run was not evaluated before it was exported.", ""]
    if [t["module"]["digest"] for t in results["tasks"]] != list(digests):
        return ["## Figures", "", "None: the run's results are of other modules than these.", ""]
    last = results["metrics"]["last"]["per_task"]
    rows = [
        f"| {_text(t['name'])} | {_percent(t['chance'])} | {_percent(zero)} | {_percent(end)} |"
        for t, zero, end in zip(results["tasks"], results["zero_shot"], last, strict=True)
    ]
    return [
        "## Figures",
        "",
        f"Accuracy on each task's test set, %, measured as `{_code(results['protocol'])}`, answered among the classes "
        f"of label space `{results['config']['evaluate']['label_space']}`.",
        "",
        "| task | chance | zero-shot | all learnt |",
        "|---|---|---|---|",
        *rows,
        "",
        "| metric | % | |",
        "|---|---|---|",
        *(f"| {name} | {_percent(results['metrics'][name]['mean'])} | {what} |" for name, what in MEANINGS.items()),
        "",
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _text(value: str) -> str:
    """Other people's words as words: nothing in them is markup, a link or another cell."""
    one_line = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]()<>#+!|~" else c for c in one_line)


def _code(value: str) -> str:
    return " ".join(str(value).replace("`", "'").split())
