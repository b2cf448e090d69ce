"""The data set that a protocol keeps away until the end: what the others taught of it is said below the matrix."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from sample_results import sample_results
from sample_sweep import sample_sweep

from diki_ray.config.protocols import protocol
from diki_ray.report.examples import Pictures
from diki_ray.report.results import held_out, table
from diki_ray.report.run import render
from diki_ray.report.sweep import render as render_sweep
from diki_ray.report.sweep_table import columns_of
from diki_ray.runs.sweep.files import setting_rows


def results_of(protocol_id: str) -> dict[str, Any]:
    return sample_results(protocol("gem-styles").order) | {"protocol": protocol_id}


def printed(results: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table(results))
    return out.getvalue()


def test_the_accuracy_on_a_kind_never_seen_is_that_before_it_is_learnt() -> None:
    results = results_of("gem-styles/embedded/image")
    name, accuracy, zero_shot = held_out(results) or ("", None, None)
    assert (name, accuracy, zero_shot) == ("gems_snow", results["accuracy"][4][5], results["zero_shot"][5])
    shown = f"{100 * results['accuracy'][4][5]:.1f} (zero-shot {100 * results['zero_shot'][5]:.1f})"
    assert f"gems_snow, of a kind never seen, once all the others are learnt: {shown}" in printed(results)
    page = render([results], lambda task: Pictures())
    assert "gems_snow, once all the others are learnt" in page


def test_other_streams_keep_nothing_away() -> None:
    assert held_out(results_of("own/image")) is None
    results = results_of("gem-styles/embedded/image")
    results["tasks"] = results["tasks"][:-1]  # not learnt to the end
    assert held_out(results) is None
    assert "never seen" not in printed(results_of("own/image"))


def test_a_sweep_shows_it_for_every_setting() -> None:
    document = sample_sweep()
    assert "never_seen" not in columns_of(document)
    for judged in (*(t["validation"] for t in document["trials"] if t["validation"]), document["chosen"]["test"]):
        judged["never_seen"] = {"mean": 0.4321, "std": 0.01}
    assert columns_of(document)[-1] == "never_seen"
    assert setting_rows(document)[0]["never_seen"] == 0.4321
    assert render_sweep(document).count("43.2 ± 1.0") == 4  # two settings, and the chosen one on either split
