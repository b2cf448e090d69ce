"""report.html: complete, self-contained, escaped, and honest about what may be compared."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sample_results import HOSTILE, sample_results, with_test_shards

from diki_ray.config import parse
from diki_ray.config.protocols import protocol
from diki_ray.errors import UserError
from diki_ray.report import next_steps as next_steps_module
from diki_ray.report.examples import Pictures, read_pictures
from diki_ray.report.next_steps import next_steps
from diki_ray.report.published import compare
from diki_ray.report.results import table
from diki_ray.report.run import MAX_DETAILED_TASKS, MAX_SQUARE_TASKS, load_results, render

NAMES = ["digits", "neon", "mist"]


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, ids, text, and whether every element is closed."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, attribute: str) -> list[str]:
        return [a[attribute] or "" for _, a in self.tags if attribute in a]


def no_pictures(task: Any) -> Pictures:
    return Pictures()


def test_the_page_is_one_well_formed_file_that_needs_nothing_else() -> None:
    page = Page(render([sample_results(NAMES)], no_pictures))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert all(target.startswith("#") for target in page.all("href"))
    assert {t.removeprefix("#") for t in page.all("href")} <= set(page.all("id"))
    policy = next(a for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_every_text_of_other_people_is_escaped_and_still_readable() -> None:
    results = sample_results(NAMES)
    html = render([results], no_pictures)
    assert HOSTILE not in html
    page = Page(html)
    assert page.text.count(HOSTILE) >= 3 * 4  # the wrong answers of each task
    assert results["command"] in page.text


def test_the_matrix_shows_chance_zero_shot_and_every_stage() -> None:
    results = sample_results(NAMES)
    text = Page(render([results], no_pictures)).text
    for row in [results["zero_shot"], *results["accuracy"], [t["chance"] for t in results["tasks"]]]:
        for value in row:
            assert f"{100 * value:.1f}" in text
    assert "±0.0" in text  # a task not learnt yet, exactly at zero-shot
    assert f"+{100 * (results['accuracy'][0][0] - results['zero_shot'][0]):.1f}" in text
    backward = results["metrics"]["backward_transfer"]["mean"]
    assert backward < 0
    assert f"−{-100 * backward:.1f}" in text


def test_configuration_versions_command_seconds_and_notes_are_there() -> None:
    text = Page(render([sample_results(NAMES)], no_pictures)).text
    for expected in ("2 h 1 min in all", "train 2 h 0 min", "7.0e-07", "torch 2.14", "covariance_eps: 1.0e-07"):
        assert expected in text
    assert text.index("plan 1.0 s") < text.index("cluster 5.0 s") < text.index("train 2 h")


def test_nothing_of_the_environment_is_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-to-be-seen")
    assert "never-to-be-seen" not in render([sample_results(NAMES)])


def test_a_stream_of_one_task_has_a_report() -> None:
    text = Page(render([sample_results(["only"], epochs=1)], no_pictures)).text
    assert "1 task on" in text
    assert "zero-shot on the same tasks –" in text


def test_a_long_stream_has_no_table_of_all_pairs() -> None:
    names = [f"t{n}" for n in range(MAX_SQUARE_TASKS + 36)]
    results = sample_results(names, epochs=1)
    html = render([results], no_pictures)
    assert len(html) < 3e6
    text = Page(html).text
    assert "Only the last of 100 rows is shown" in text
    assert "its own task" in text
    assert f"{100 * results['accuracy'][-1][5]:.1f}" in text


def test_of_very_many_tasks_the_worst_are_shown_in_detail_and_the_page_stays_small() -> None:
    names = [f"t{n}" for n in range(1000)]
    results = sample_results(names, epochs=1)
    last = results["metrics"]["last"]["per_task"]
    read: list[str] = []

    def pictures(task: Any) -> Pictures:
        read.append(task["name"])
        return no_pictures(task)

    html = render([results], pictures)
    assert len(html) < 6e6
    assert read == [names[j] for j in sorted(sorted(range(1000), key=last.__getitem__)[:MAX_DETAILED_TASKS])]
    assert "Of 1000 tasks the 128 of the lowest accuracy" in Page(html).text
    shown = Console(width=160, file=io.StringIO())
    shown.print(table(results))
    lines = shown.file.getvalue().splitlines()
    assert len(lines) < 30
    worst = min(range(1000), key=last.__getitem__)
    assert any(f"{names[worst]} " in line and f"{100 * last[worst]:.1f}" in line for line in lines)


def test_missing_values_are_gaps_and_not_errors() -> None:
    results = sample_results(NAMES)
    task = results["tasks"][0]
    task["history"][1]["loss"] = float("nan")
    for epoch in task["history"]:
        del epoch["validation_accuracy"]
    task["best_epoch"] = None
    task["weights"]["learnt"] = {"mean": None, "counts": [0] * 20}
    results["accuracy"][0][0] = None
    page = render([results], no_pictures)
    assert "no epoch chosen" in Page(page).text
    assert not re.search(r"\b(nan|inf)\b|[=>\"]None\b[^:]", page)


# --- examples -------------------------------------------------------------------------------------------------------


def decoded(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def test_pictures_are_the_samples_of_their_numbers(tmp_path: Path) -> None:
    task = with_test_shards(sample_results(NAMES)["tasks"][0], tmp_path)
    pictures = read_pictures(task)
    assert pictures.problem is None
    assert len(pictures.by_key) == 8
    for n in range(8):
        assert abs(decoded(pictures.by_key[f"test/{n:06d}"]).mean() - 30 * n) < 3


def test_a_row_after_skipped_samples_finds_its_picture_by_key(tmp_path: Path) -> None:
    task = with_test_shards(sample_results(NAMES)["tasks"][1], tmp_path)
    assert sum(task["skipped_test"].values()) == 2
    example = task["examples"][0] | {"sample": 3, "key": "test/000005"}
    pictures = read_pictures(task | {"examples": [example]})
    assert abs(decoded(pictures.by_key["test/000005"]).mean() - 150) < 3


def test_a_damaged_sample_costs_its_own_picture(tmp_path: Path) -> None:
    task = with_test_shards(sample_results(NAMES)["tasks"][0], tmp_path)
    shard = tmp_path / "test-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 0xFF
    shard.write_bytes(data)
    pictures = read_pictures(task)
    assert len(pictures.by_key) == 7
    assert pictures.problem == "1 of 8 test images could not be read"


def test_shards_that_are_away_or_others_are_said_and_the_answers_still_shown(tmp_path: Path) -> None:
    results = sample_results(NAMES)
    away = read_pictures(results["tasks"][0])
    assert away.problem is not None
    assert away.problem.startswith("the test images could not be read: there is no /nowhere/digits/index.json")
    other = with_test_shards(results["tasks"][1], tmp_path)
    other["data"]["digest"] = "0" * 64
    assert "is not the one this run was evaluated on" in str(read_pictures(other).problem)
    text = Page(render([results])).text
    assert "there is no /nowhere/digits/index.json" in text
    assert "no picture" in text
    assert "zero-shot: two words" in text


# --- published figures ----------------------------------------------------------------------------------------------


def mtil(routing: str = "image") -> dict[str, Any]:
    """A run that follows mtil-1/coop in everything."""
    results = sample_results(protocol("mtil-1").order)
    results["protocol"] = f"mtil-1/coop/{routing}"
    results["config"]["evaluate"]["routing"] = routing
    for task in results["tasks"]:
        task["data"]["protocol"] = "coop"
    return results


def test_published_figures_are_shown_for_the_same_split_and_routing_only() -> None:
    image, batch = compare(mtil("image")), compare(mtil("batch"))
    assert image is not None
    assert batch is not None
    assert {p.method: p.routing for p in image.rows} == {"DPW": None}  # DIKI's own figures are batch-voted
    assert {p.method: p.routing for p in batch.rows} == {"DIKI": "batch", "DPW": None}
    assert image.num_left_out == batch.num_left_out + 1
    assert batch.backbone == "ViT-B-16/openai"  # not this run's
    text = Page(render([mtil("batch")], no_pictures)).text
    assert "85.1" in text
    assert "unknown" in text
    assert "ZSCL" not in text.replace("zscl", "")  # the zscl split is another protocol


def test_published_zero_shot_stands_beside_ours_where_it_is_known() -> None:
    results = mtil()
    assert "zero-shot, published" not in Page(render([results], no_pictures)).text  # only known on the zscl split
    results["protocol"] = "mtil-1/zscl/image"
    for task in results["tasks"]:
        task["data"]["protocol"] = "zscl"
    comparison = compare(results)
    assert comparison is not None
    assert (comparison.rows[0].transfer, comparison.rows[0].average, comparison.rows[0].last) == (69.4, 65.3, 65.3)
    assert "zero-shot, published" in Page(render([results], no_pictures)).text


def test_a_run_on_the_published_backbone_is_not_warned_about_it() -> None:
    results = mtil()
    results["backbone"]["name"] = "ViT-B-16"
    results["config"]["backbone"] |= {"name": "ViT-B-16", "pretrained": "openai"}
    comparison = compare(results)
    assert comparison is not None
    assert comparison.backbone is None


def test_an_own_protocol_is_compared_with_nothing() -> None:
    assert compare(sample_results(NAMES)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["tasks"].reverse(), "in that order"),
        (lambda r: r["tasks"][3]["data"].update(protocol="zscl"), "split zscl"),
        (lambda r: r["config"]["evaluate"].update(label_space="all"), "label space is all"),
        (lambda r: r["config"]["tasks"][0].update(shots=16), "few shots"),
        (
            lambda r: r["tasks"][8]["data"].update(sizes_that_differ={"test": {"found": 1, "published": 3669}}),
            "OxfordPets: not as many images",
        ),
    ],
)
def test_a_claimed_protocol_is_checked(change: Any, said: str) -> None:
    results = mtil()
    change(results)
    comparison = compare(results)
    assert comparison is not None
    assert comparison.rows == ()
    assert said in " ".join(comparison.differences)
    assert said in Page(render([results], no_pictures)).text


def test_shots_of_a_few_shot_protocol_are_checked_by_counting() -> None:
    results = mtil()
    results["protocol"] = "mtil-fs16-11/coop/image"
    comparison = compare(results)
    assert comparison is not None
    assert comparison.differences == ()
    results["tasks"][0]["num_train"] = 16 * 3 + 1
    comparison = compare(results)
    assert comparison is not None
    assert "more than 16 images a class" in comparison.differences[0]


# --- several runs ---------------------------------------------------------------------------------------------------


def test_several_runs_stand_side_by_side_with_what_differs() -> None:
    one, two = sample_results(NAMES, "one"), sample_results(NAMES[:2], "two", seed=1)
    two["config"]["train"]["lr"] = 0.25
    text = Page(render([one, two], no_pictures)).text
    assert "Settings that differ" in text
    assert "train.lr" in text
    assert "digits, neon, mist" in text
    assert "train.epochs" not in text.partition("Accuracy on each test set")[0]
    assert "not comparable" not in text


def test_runs_that_cannot_be_compared_are_marked() -> None:
    one, two = sample_results(NAMES, "same"), copy.deepcopy(sample_results(NAMES, "same"))
    two["protocol"] = "own/batch"
    two["backbone"]["digest"] = "c" * 64
    two["tasks"][1]["data"]["digest"] = "f" * 64
    two["config"]["run"]["storage"] = "elsewhere"
    text = Page(render([one, two], no_pictures)).text
    for said in ("are not comparable", "different backbones", "from run to run: neon.", "same (somewhere)"):
        assert said in text


# --- finding results ------------------------------------------------------------------------------------------------


def test_what_a_data_set_lacks_is_said_at_the_top() -> None:
    results = mtil()
    results["tasks"][8]["data"]["shortcomings"] = ["train has 111 images, the published split 2,944"]
    assert "OxfordPets is not complete: train has 111 images" in Page(render([results], no_pictures)).text


def test_results_are_found_by_path_and_missing_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(sample_results(NAMES)))
    assert load_results(str(path), "unused")["run"] == "made-up"
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        load_results(str(path), "unused")
    path.write_text("{")
    with pytest.raises(UserError, match=r"is not a results\.json"):
        load_results(str(path), "unused")
    with pytest.raises(UserError, match="there is no file"):
        load_results(str(tmp_path / "other.json"), "unused")
    with pytest.raises(UserError, match="no results of a run 'x'; its runs are: none"):
        load_results("x", str(tmp_path / "storage"))
    assert not (tmp_path / "storage").exists()


# --- what to type next ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def on_a_persons_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


def test_next_steps_quote_what_a_shell_would_split() -> None:
    config = parse({"run": {"name": "r", "storage": "/tmp/my runs"}, "tasks": [{"data": "embedded:digits"}]})
    text = next_steps(config, "python jobs/continual.py --config c.yaml", "c.yaml")
    assert " predict IMAGE --storage '/tmp/my runs' --run r" in text
    assert "python -m webbrowser file:///tmp/my%20runs/runs/r/results/report.html" in text
    assert "these lines at the end of `tasks:` in c.yaml" in text


def test_a_report_in_object_storage_is_opened_through_a_local_copy() -> None:
    config = parse({"run": {"name": "r", "storage": "s3://b/p"}, "tasks": [{"data": "embedded:digits"}]})
    assert " report r --storage s3://b/p --output report.html" in next_steps(config, "…", None)


def test_a_submitted_job_leads_to_no_browser_of_its_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = parse({"run": {"name": "r", "storage": "/mnt/diki/runs"}, "tasks": [{"data": "embedded:digits"}]})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    text = next_steps(config, "…", None)
    assert " report r --storage /mnt/diki/runs --output report.html" in text
    assert "webbrowser" not in text

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    (tmp_path / "namespace").write_text("diki\n")
    monkeypatch.setattr(next_steps_module, "_NAMESPACE", tmp_path / "namespace")
    copied = f"kubectl cp -c ray-head diki/{socket.gethostname()}:/mnt/diki/runs/runs/r/results/report.html report.html"
    assert copied in next_steps(config, "…", None)
