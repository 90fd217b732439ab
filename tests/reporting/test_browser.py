"""The page in a real browser: nothing breaks, and its numbers are those of the command line."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright")

from playwright.sync_api import sync_playwright
from tests.reporting.made import SCRIPT

import taskvec as tv
from taskvec import zoo

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
Run = Callable[[str], Path]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page, and what went wrong in it."""

    def __init__(self, browser: Any, path: Path, width: int = 1200) -> None:
        self.errors: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(path.as_uri())
        self.page.evaluate("taskvecReport.ready.then(() => taskvecReport.drawAll()).then(() => 1)")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.errors.append(request.url)

    def set(self, **changes: Any) -> None:
        self.page.evaluate("changes => taskvecReport.live[0].set(changes).then(() => 1)", changes)

    def weights(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = self.page.evaluate("taskvecReport.live[0].weights")
        return found

    def download(self, tmp_path: Path) -> Path:
        with self.page.expect_download() as started:
            self.page.click("button[name=table]")
        path = tmp_path / "table.csv"
        started.value.save_as(path)
        return path


@pytest.fixture(scope="module")
def opened(
    browser: Any, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Opened]:
    pages: dict[Any, Opened] = {}

    def page(mark: str = "", width: int = 1200) -> Opened:
        if (mark, width) not in pages:
            out = tmp_path_factory.mktemp("page") / "report.html"
            tv.report(run(mark), out)
            pages[mark, width] = Opened(browser, out, width)
        return pages[mark, width]

    return page


@pytest.mark.parametrize("width", [1200, 400])
def test_every_section_is_drawn_without_errors(opened: Any, width: int) -> None:
    page = opened(width=width)
    assert page.errors == []
    sections = page.page.query_selector_all("main section")
    assert len(sections) == 11
    for section in sections:
        if section.get_attribute("id") != "verdict":
            marks = section.query_selector_all(".chart svg.marks g[class*=mark-] path")
            assert marks, section.get_attribute("id")
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_zoo(browser: Any, tmp_path: Path) -> None:
    tasks = {"math": zoo.path("math"), "code": zoo.path("code")}
    family = tv.Family(base=zoo.path("base"), instruct=zoo.path("instruct"), tasks=tasks)
    out = tmp_path / "zoo.html"
    tv.report(tv.scan(family, cache="off"), out)
    page = Opened(browser, out)
    assert page.errors == []
    assert len(page.page.query_selector_all("#layers .chart svg.marks")) == 2


@pytest.mark.parametrize("granularity", ["tensor", "module", "block"])
@pytest.mark.parametrize("scheme", ["linear", "logarithmic", "threshold"])
@pytest.mark.parametrize("normalize", ["none", "mean", "norm"])
def test_weights_are_those_of_the_command_line(
    opened: Any, run: Run, granularity: str, scheme: str, normalize: str
) -> None:
    scan = tv.load_scan(run("") / "scan.json")
    threshold = 0.87
    table = tv.lata(scan, scheme=scheme, granularity=granularity, threshold=threshold,
                    normalize_weights=normalize)  # fmt: skip
    page = opened()
    page.set(scheme=scheme, granularity=granularity, threshold=threshold, normalize=normalize,
             painted={}, scales={"math": 0.5, "code": -0.3})  # fmt: skip
    found = page.weights()
    for task in scan.tasks:
        expected = list(table.of(task).values())
        assert len(set(expected)) > 1
        np.testing.assert_allclose(found[task], expected, rtol=0, atol=1e-6)
    scaled = np.array([s * np.array(list(table.of(t).values()))
                       for t, s in zip(scan.tasks, (-0.3, 0.5), strict=True)])  # fmt: skip
    norm = np.sqrt(np.einsum("in,nij,jn->", scaled, scan.gram[:, 2:, 2:], scaled))
    assert page.page.evaluate("taskvecReport.live[0].total") == pytest.approx(norm, abs=1e-6)


def test_the_slider_changes_the_downloaded_table(opened: Any, run: Run, tmp_path: Path) -> None:
    page = opened()
    page.set(scheme="threshold", granularity="tensor", normalize="none", painted={})
    slider = page.page.locator("input[name=sigma]")
    tables = []
    for sigma in ("0.8", "0.95"):
        slider.fill(sigma)
        path = page.download(tmp_path)
        tables.append(tv.load_table(path))
        expected = tv.lata(tv.load_scan(run("") / "scan.json"), scheme="threshold",
                           threshold=float(sigma))  # fmt: skip
        np.testing.assert_array_equal(tables[-1].weights, expected.weights)
    assert not np.array_equal(tables[0].weights, tables[1].weights)


def test_painting_changes_the_table_and_the_merge_takes_it(
    opened: Any, run: Run, tmp_path: Path
) -> None:
    page = opened()
    page.set(scheme="logarithmic", granularity="tensor", normalize="none", painted={}, view="map",
             measure="weight")  # fmt: skip
    before = tv.load_table(page.download(tmp_path))
    page.page.locator("input[name=brush]").fill("0.25")
    page.page.locator("input[name=paint]").check()
    cell = page.page.locator("#layers .chart svg.marks .mark-rect path").nth(40)
    cell.scroll_into_view_if_needed()
    box = cell.bounding_box()
    page.page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 3, box["y"] + 24, steps=4)
    page.page.mouse.up()
    page.page.locator("input[name=paint]").uncheck()
    painted = page.download(tmp_path)
    after = tv.load_table(painted)
    changed = before.weights != after.weights
    assert 1 < changed.sum() < 12
    assert set(after.weights[changed]) == {0.25}

    recipe = tv.load_recipe(run("") / "merged" / "taskvec.yaml")
    by_hand = tmp_path / "by-hand.csv"
    after.save(by_hand)
    one = tv.merge(recipe, tmp_path / "one", table=painted)
    other = tv.merge(recipe, tmp_path / "other", table=by_hand)
    plain = tv.merge(recipe, tmp_path / "plain", table=before)
    assert one.fingerprint == other.fingerprint != plain.fingerprint


def test_an_unpainted_table_gives_the_merge_of_the_command_line(
    opened: Any, run: Run, tmp_path: Path
) -> None:
    page = opened()
    page.set(scheme="logarithmic", granularity="tensor", normalize="none", painted={})
    recipe = tv.load_recipe(run("") / "merged" / "taskvec.yaml")
    mine = tv.merge(recipe, tmp_path / "mine", table=page.download(tmp_path))
    assert mine.fingerprint == tv.merge(recipe, tmp_path / "theirs").fingerprint


def test_weights_can_be_typed(opened: Any, tmp_path: Path) -> None:
    page = opened()
    page.set(scheme="logarithmic", granularity="tensor", normalize="none", painted={})
    name = "model.layers.3.mlp.up_proj.weight"
    page.page.fill("#layers input[type=search]", name)
    page.page.keyboard.press("Tab")
    box = page.page.get_by_label(f"weight of math for {name}")
    box.fill("0.125")
    box.blur()
    assert tv.load_table(page.download(tmp_path)).of("math")[name] == 0.125


def test_samples_are_filtered_and_searched(opened: Any) -> None:
    page = opened().page
    bar = "#scores [data-live=samples] select"
    page.locator(bar).nth(1).select_option("instruct")
    page.locator(bar).nth(2).select_option("merged")
    page.locator(bar).nth(3).select_option("lost")
    texts = page.locator("#scores article .prompt").all_inner_texts()
    assert texts == ["Q2: ", "Q5: "]  # where i % 3 is that of the merge, which is wrong there
    page.fill("#scores [data-live=samples] input[type=search]", "q5")
    assert page.locator("#scores article .prompt").all_inner_texts() == ["Q5: "]
    marks = page.locator("#scores article mark").all_inner_texts()
    assert marks == ["instruct", "merged"]


def test_markup_in_names_runs_nowhere(opened: Any) -> None:
    page = opened(SCRIPT)
    assert page.errors == []
    assert page.page.evaluate("window.attacked") is None
    assert page.page.locator("img").count() == 0
    assert SCRIPT in page.page.locator("#layers h3").first.inner_text()
    assert SCRIPT in page.page.locator("#scores article .reply").first.inner_text()


def test_downloaded_names_with_commas_are_quoted(opened: Any, tmp_path: Path) -> None:
    page = opened('a,"b"')
    rows = list(csv.reader(io.StringIO(page.download(tmp_path).read_text())))
    assert rows[0] == ["tensor", 'codea,"b"', "math"]


def test_speed_of_a_redraw(browser: Any, tmp_path: Path) -> None:
    """Printed, not asserted: 1,000 tensors and five tasks, processor time of the page."""
    out = tmp_path / "large.html"
    tv.report(made_scan(tensors=1000, tasks=5), out)
    page = Opened(browser, out)
    page.set(scheme="threshold")
    session = page.page.context.new_cdp_session(page.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    before = seconds()
    page.page.evaluate("""async () => {
        const slider = document.querySelector('input[name=sigma]');
        for (let i = 0; i < 10; i++) {
            slider.value = 0.5 + i / 25;
            slider.dispatchEvent(new Event('input'));
            await new Promise(requestAnimationFrame);
        }
    }""")
    took = 1000 * (seconds() - before) / 10
    print(f"redraw: {took:.0f} ms; page: {out.stat().st_size / 1e6:.1f} MB")
    assert page.errors == []


def test_a_page_of_300_tensors_and_five_tasks_is_small(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    tv.report(made_scan(tensors=300, tasks=5), out)
    assert out.stat().st_size < 4_000_000


def made_scan(tensors: int, tasks: int) -> Any:
    """A scan of a family that does not exist."""
    from taskvec.layers import classify
    from taskvec.statistics.scan import Scan

    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
             "post_attention_layernorm")  # fmt: skip
    names = sorted(f"model.layers.{i // 9}.{kinds[i % 9]}.weight" for i in range(tensors))
    rng = np.random.default_rng(0)
    vectors = rng.normal(0, 1, (tensors, 2 + tasks, 12)) * np.linspace(1, 3, 2 + tasks)[:, None]
    count = rng.integers(1, 1000, (tensors, tasks, tasks))
    count = count + count.transpose(0, 2, 1)
    return Scan(
        tuple(f"task{i}" for i in range(tasks)), tuple(names), ((64, 64),) * tensors,
        tuple(map(classify, names)), True, vectors @ vectors.transpose(0, 2, 1), count // 2, count,
        {},
    )  # fmt: skip
