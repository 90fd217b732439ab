"""The report without a browser: what is collected, what sections say, what the page embeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.reporting.made import (
    SCRIPT,
    write_evaluation,
    write_search,
    write_sweep,
)

import taskvec as tv
from taskvec.errors import UsageError
from taskvec.reporting import charts
from taskvec.reporting.api import FORMATS
from taskvec.reporting.collect import collect
from taskvec.reporting.document import ReportData
from taskvec.reporting.evaluations import verdicts
from taskvec.reporting.families import scan_of
from taskvec.reporting.layers import family_points, tables_of
from taskvec.reporting.sections import Charts, Live, ReportSection, TableBlock, Words
from taskvec.reporting.studies import own_value, search_specs, sweep_charts

Run = Callable[[str], Path]
SECTIONS = [
    "verdict", "family", "layers", "tasks", "scores", "search", "fit", "sweeps", "disentanglement",
    "training", "compare",
]  # fmt: skip


def words_of(section: ReportSection) -> str:
    return " ".join(block.text for block in section.blocks if isinstance(block, Words))


def specs_of(sections: list[ReportSection]) -> list[Any]:
    found = []
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Charts):
                found += [chart.spec for chart in block.charts]
            elif isinstance(block, Live):
                found += block.specs.values()
    return found


def test_everything_under_a_folder_is_found_and_shown(run: Run) -> None:
    report = tv.report(run(""))
    document = report.document
    assert [section.id for section in report.sections] == SECTIONS
    for part in ("families", "merges", "evaluations", "searches", "fits", "sweeps", "pairs",
                 "disentanglements", "trainings"):  # fmt: skip
        assert len(getattr(document, part)) == 1, part
    assert document.trainings[0].curves["loss"] == [[1, 1.0], [2, 0.5], [3, 1 / 3]]
    assert document.trainings[0].curves["validation_loss"] == [[3, 0.4]]


def test_a_report_of_one_file_has_its_sections_only(tmp_path: Path) -> None:
    report = tv.report([write_search(tmp_path)])
    assert [section.id for section in report.sections] == ["verdict", "search"]


def test_a_merged_folder_brings_the_cached_scan(run: Run, tmp_path: Path) -> None:
    models = run("").parent / "models"
    tasks = {task: models / task for task in ("math", "code")}
    family = tv.Family(base=models / "base", instruct=models / "instruct", tasks=tasks)
    assert collect([run("") / "merged"]).families == []
    tv.scan(family)
    (found,) = collect([run("") / "merged"]).families
    assert found.tasks == ["code", "math"]


def test_statistics_survive_the_document(run: Run) -> None:
    scan = tv.load_scan(run("") / "scan.json")
    document = ReportData.model_validate_json(tv.report(scan).to_json())
    found = scan_of(document.families[0])
    np.testing.assert_array_equal(found.gram, scan.gram)
    np.testing.assert_array_equal(found.agree, scan.agree)
    np.testing.assert_array_equal(found.sizes, scan.sizes)
    for granularity in ("tensor", "module", "block"):
        layers = [k.at(granularity, n) for k, n in zip(scan.keys, scan.names, strict=True)]
        index = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
        assert document.families[0].layers[granularity] == [index[layer] for layer in layers]


def test_the_document_fits_its_schema_and_refuses_others(run: Run) -> None:
    document = tv.report(run("")).document
    text = document.model_dump_json()
    assert ReportData.model_validate_json(text) == document
    with pytest.raises(ValueError, match="unknown"):
        ReportData.model_validate(json.loads(text) | {"unknown": 1})


def test_points_of_the_family_lie_as_far_apart_as_the_models(run: Run) -> None:
    """Two tasks and an anchor span a plane, so that their distances are exact."""
    scan = tv.load_scan(run("") / "scan.json")
    family = tv.report(scan).document.families[0].model_copy(update={"has_base": False})
    points, share = family_points(family, [])
    assert share == pytest.approx(1)
    gram = scan.gram.sum(0)
    place = {p["name"]: np.array([p["x"], p["y"]]) for p in points}
    unit = math.sqrt(gram[0, 0])
    for t, task in enumerate(scan.tasks):
        distance = np.linalg.norm(place[f"task {task}"] - place["anchor"]) * unit
        assert distance == pytest.approx(math.sqrt(gram[2 + t, 2 + t]))
    apart = math.sqrt(gram[2, 2] + gram[3, 3] - 2 * gram[2, 3])
    code, math_ = (place[f"task {task}"] for task in ("code", "math"))
    assert np.linalg.norm(code - math_) * unit == pytest.approx(apart)


def test_the_merge_is_a_point_of_the_family(run: Run) -> None:
    document = tv.report(run("")).document
    family = document.families[0]
    points, share = family_points(family, tables_of(document, family))
    assert 0 < share <= 1
    assert {p["kind"] for p in points} == {"anchor", "base", "task", "merge"}


def test_the_verdict_says_what_is_kept_and_what_changes(tmp_path: Path) -> None:
    write_evaluation(tmp_path)
    (evaluation,) = collect([tmp_path]).evaluations
    (text,) = verdicts(evaluation)
    # (0.75 − 0.25) / (0.95 − 0.25), and the ends of the interval in the same way.
    assert "keeps 71% [64%, 79%] of math's gain in sums (0.75 of 0.95)" in text
    assert "text worsens: perplexity +5.0% [+4.5%, +5.5%]" in text
    assert text.endswith("compared with instruct.")


@pytest.mark.parametrize(
    ("wanted", "words"), [("up", "as expected"), ("down", "against what was expected")]
)
def test_the_verdict_knows_which_way_a_score_should_move(
    tmp_path: Path, wanted: str, words: str
) -> None:
    path = write_evaluation(tmp_path)
    results = json.loads(path.read_text())
    model = results["tasks"]["text"][2]["model"]
    results["expected"] = {model: {"text": wanted}}
    path.write_text(json.dumps(results))
    (evaluation,) = collect([tmp_path]).evaluations
    (text,) = verdicts(evaluation)
    assert f"text rises {words}: perplexity +5.0%" in text  # for a forgotten skill, not worse
    assert "worsens" not in text


def test_the_verdict_names_what_did_not_change(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path)
    told = json.loads(path.read_text())
    row = told["tasks"]["text"][2]
    row["difference"] = {"value": 0.1, "interval": [-0.1, 0.3], "n": 60}
    path.write_text(json.dumps(told))
    (evaluation,) = collect([tmp_path]).evaluations
    assert "text unchanged (interval of the difference includes 0)" in verdicts(evaluation)[0]


def test_samples_stand_side_by_side(tmp_path: Path) -> None:
    write_evaluation(tmp_path)
    (evaluation,) = collect([tmp_path]).evaluations
    (part,) = evaluation.samples
    assert part.models == ["instruct", "math", "merged"]
    assert part.samples[1].replies == ["1 instruct says ", "1 math says ", "1 merged says "]
    assert part.samples[1].scores == [1.0, 0.0, 1.0]


def test_samples_that_do_not_fit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskvec.reporting import collect as room

    write_evaluation(tmp_path, samples=50)
    everything = collect([tmp_path])
    assert everything.notes == []
    monkeypatch.setattr(room, "TEXT_BUDGET", 1000)
    document = collect([tmp_path])
    (part,) = document.evaluations[0].samples
    left = 50 - len(part.samples)
    assert 0 < len(part.samples) < 50
    assert f"{left} samples are left out" in document.notes[0]


# Charts


def test_every_spec_is_valid_vega_lite(run: Run) -> None:
    import altair as alt

    specs = specs_of(list(tv.report(run("")).sections))
    assert len(specs) > 20
    for spec in specs:
        alt.Chart.from_dict({k: v for k, v in spec.items() if k != "datasets"}, validate=True)


def test_every_spec_is_drawn(run: Run) -> None:
    import vl_convert

    for spec in specs_of(list(tv.report(run("")).sections)):
        svg = vl_convert.vegalite_to_svg({"$schema": charts.SCHEMA, **spec})
        assert svg.startswith("<svg")


def test_candidates_are_in_every_panel(tmp_path: Path) -> None:
    told = json.loads(write_search(tmp_path).read_text())
    specs = search_specs(told)
    assert list(specs) == ["candidates", "importance"]
    trials = specs["candidates"]["datasets"]["trials"]
    assert [row["number"] for row in trials] == list(range(24))
    assert [row["number"] for row in trials if row["what"] == "winner"] == [3]
    titles = [view["title"] for view in specs["candidates"]["concat"]]
    assert titles[0] == "all candidates"
    assert {"two axes", "goals", "axis and score"} <= set(titles)


def test_a_sweep_marks_the_recipe_at_its_place(tmp_path: Path) -> None:
    told = json.loads(write_sweep(tmp_path).read_text())
    assert own_value(told) == 0.7
    (_, chart) = sweep_charts(told)
    places = [
        row for rows in chart.spec["datasets"].values() for row in rows if set(row) == {"x", "y"}
    ]
    assert places == [{"x": 0.7, "y": 0.6}]
    told["recipe"]["tasks"]["code"]["threshold"] = 0.9
    assert own_value(told) is None


# Files


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_by_the_name_of_the_file(run: Run, tmp_path: Path, kind: str) -> None:
    out = tmp_path / f"page.{kind}"
    report = tv.report(run(""), out)
    text = out.read_text()
    if kind == "json":
        assert ReportData.model_validate_json(text) == report.document
    if kind == "html":
        assert text.startswith("<!doctype html>")
        assert "http://" not in re.sub(r"<script>/\*.*?</script>", "", text, flags=re.S)
    if kind == "md":
        assert "| merged | 0.750 [0.700, 0.800] | 2.100 [2.050, 2.150] |" in text
        assert {path.name for path in tmp_path.iterdir()} == {
            "page.md", "page-scores.svg", "page-weights.svg"
        }  # fmt: skip


def test_markdown_escapes_names(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "eval", "|<b>x</b>")
    text = tv.report(tmp_path / "eval").to_markdown()
    assert "<b>" not in text
    assert "merged\\|\\<b\\>x" in text


class Scripts(HTMLParser):
    """Elements and attributes of a page as a browser splits it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or "" if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.text[self._inside] = self.text.get(self._inside, "") + data


def test_markup_in_names_and_texts_stays_text(run: Run) -> None:
    page = Scripts()
    page.feed(tv.report(run(SCRIPT)).to_html())
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert len(scripts) == 5
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    document = ReportData.model_validate_json(page.text["document"])
    assert document.families[0].tasks[0] == f"code{SCRIPT}"
    assert SCRIPT in document.evaluations[0].samples[0].samples[0].replies[0]


def test_the_page_forbids_every_connection(tmp_path: Path) -> None:
    page = Scripts()
    page.feed(tv.report(write_search(tmp_path)).to_html())
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy.replace("http-equiv", "")


# What is refused


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds nothing to report; expected a scan"):
        tv.report(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        tv.report(tmp_path / "none")
    with pytest.raises(UsageError, match="no path is given"):
        tv.report([])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="is not a file that a report can show"):
        tv.report(tmp_path / "other.json")


@pytest.mark.parametrize(("key", "value"), [("trials", 3), ("goals", {}), ("winner", "x")])
def test_a_damaged_file_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = write_search(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=rf"{path}: is damaged, or of another version"):
        tv.report(path)


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format must be one of html, json, md; got 'pdf'"):
        tv.report(write_search(tmp_path), tmp_path / "x", format="pdf")


# The command


def test_the_command_writes_and_tells(cli: Any, tmp_path: Path) -> None:
    write_search(tmp_path)
    code, out, err = cli("report", tmp_path, "-o", tmp_path / "r.html", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["sections"] == ["Verdict", "Search"]
    assert (tmp_path / "r.html").stat().st_size > 500_000
    code, _, err = cli("report")
    assert code == 2
    assert "PATH is missing" in err


def test_a_table_is_one_row_a_model(run: Run) -> None:
    (scores,) = [s for s in tv.report(run("")).sections if s.id == "scores"]
    (table,) = [block for block in scores.blocks if isinstance(block, TableBlock)]
    assert [row[0] for row in table.rows] == ["instruct", "math", "merged"]
