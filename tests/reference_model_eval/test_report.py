"""The report: self-contained, complete, made from files alone, and no bolder than the data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference_model.checkpoint import RunDirError
from reference_model.demo import QUICK
from reference_model.points import Point
from reference_model.report import load_run, write_report
from reference_model.report_images import sheet
from reference_model.report_sections import conclusions, headline
from reference_model.sheets import read_sheet
from reference_model.sweep_record import DISTANCE, Measurement, SweepRecord, load_record

VOID = {"meta", "img", "input", "br", "link"}
LOADS = re.compile(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?\s*(https?:|//)""")


class Checker(HTMLParser):
    """Fails on tags that do not nest, and collects ids and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            raise AssertionError(f"</{tag}> closes {self.open[-3:]}")
        self.open.pop()


def check_page(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    if checker.open:
        raise AssertionError(f"never closed: {checker.open}")
    return checker


def assert_self_contained(text: str) -> None:
    found = LOADS.search(text)
    if found:
        raise AssertionError(f"the page asks for {text[found.start() : found.start() + 80]!r}")


def record_of(raw: list[float] | None, averages: dict[float, list[float]]) -> SweepRecord:
    record = SweepRecord({})
    rows = [(None, raw)] if raw else []
    for sigma_rel, distances in [*rows, *averages.items()]:
        record.add(Measurement(Point(sigma_rel, 1.0), {DISTANCE: tuple(distances)}))
    return record


def test_the_page_is_well_formed_self_contained_and_complete(finished_demo: Path):
    text = (finished_demo / "report.html").read_text()
    checker = check_page(text)
    assert_self_contained(text)
    assert len(set(checker.ids)) == len(checker.ids), "ids must be unique"
    for section in ("quality", "samples", "profiles", "trust", "training", "facts", "next"):
        assert section in checker.ids
    assert "{{" not in text, "a placeholder was left"
    kinds = {address.split(":")[0].split("=")[0] for address in checker.addresses}
    assert kinds == {"data", "#sigma"}


@pytest.mark.parametrize(
    "text", ['<img src="https://x.org/a.png">', "<style>@import '//x.org/a.css'</style>"]
)
def test_the_check_for_requests_can_fail(text: str):
    with pytest.raises(AssertionError, match="the page asks for"):
        assert_self_contained(text)


def test_the_check_for_nesting_can_fail():
    with pytest.raises(AssertionError, match="closes"):
        check_page("<p><b></p></b>")


def test_every_length_has_a_state_and_a_link(finished_demo: Path):
    text = (finished_demo / "report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert data is not None
    states = json.loads(data[1])
    assert [state["sigma"] for state in states] == list(QUICK.sigma_rels)
    for i, sigma_rel in enumerate(QUICK.sigma_rels):
        assert f'data-state="{i}"' in text
        assert f'href="#sigma={sigma_rel:g}"' in text
    best = load_record(finished_demo)
    assert best is not None
    assert best.best is not None
    index = QUICK.sigma_rels.index(best.best.sigma_rel or 0.0)
    # Without the script, exactly the best length's state shows.
    assert set(re.findall(r'class="state on" data-state="(\d+)"', text)) == {str(index)}


def test_it_is_made_from_files_alone_and_again_the_same(run_dir: Path):
    made = write_report(run_dir).read_bytes()
    assert made == write_report(run_dir).read_bytes()
    for path in (run_dir / "ema").iterdir():  # snapshots may be gone by then
        path.unlink()
    (run_dir / "checkpoint.pt").unlink()
    assert made == write_report(run_dir).read_bytes()


def test_a_run_without_a_sweep_gets_a_page_that_says_how_to_make_one(run_dir: Path):
    (run_dir / "sweep.json").unlink()
    text = write_report(run_dir).read_text()
    checker = check_page(text)
    assert "quality" not in checker.ids
    assert f"sweep --run-dir {run_dir}" in text


def test_a_run_without_sheets_or_directly_tracked_lengths_is_reported_too(run_dir: Path):
    for path in (run_dir / "samples").iterdir():
        path.unlink()
    record = load_record(run_dir)
    assert record is not None
    data = json.loads((run_dir / "sweep.json").read_text())
    for m in data["measurements"]:
        m["direct"] = None
    (run_dir / "sweep.json").write_text(json.dumps(data))
    checker = check_page(write_report(run_dir).read_text())
    assert "samples" not in checker.ids
    assert "trust" in checker.ids


def test_what_is_no_run_is_named(tmp_path: Path, run_dir: Path):
    with pytest.raises(RunDirError, match=r"config\.json does not exist"):
        write_report(tmp_path)
    (run_dir / "stats.jsonl").write_text('{"nimg": 1}\n{"ni')
    with pytest.raises(RunDirError, match=r"stats\.jsonl has a line that is not JSON"):
        write_report(run_dir)


def test_names_from_outside_cannot_become_markup(run_dir: Path):
    renamed = run_dir.rename(run_dir.with_name("<b>&run"))
    text = write_report(renamed).read_text()
    check_page(text)
    assert "<b>" not in text


def test_the_headline_claims_no_more_than_the_measurements_carry():
    better = record_of([4.0, 4.2, 4.1], {0.1: [2.0, 2.1, 2.05], 0.2: [3.0, 3.1, 3.2]})
    assert "2.0 times closer to real ones" in headline(better)
    noisy = record_of([2.0, 2.4, 2.1], {0.1: [2.1, 2.2, 2.05]})
    assert "less than the measurement can resolve" in headline(noisy)
    worse = record_of([1.0, 1.1, 1.05], {0.1: [2.0, 2.1, 2.05]})
    assert "raw weights beat every average" in headline(worse)
    assert "has length 0.1" in headline(record_of(None, {0.1: [1.0, 1.2]}))


def test_conclusions_name_costs_only_where_they_exceed_the_noise():
    record = record_of(
        [4.0, 4.4, 4.2],
        {0.01: [3.0, 3.3, 3.1], 0.1: [2.0, 2.2, 2.1], 0.15: [2.1, 2.1, 2.2], 0.28: [6.0, 6.6, 6.2]},
    )
    text = " ".join(conclusions(record))
    assert "Too short an average, 0.01, costs 49 %." in text
    assert "Too long an average, 0.28, costs 198 %, worse than no average at all." in text
    assert "from 0.1 to 0.15 cannot be told apart" in text

    flat = record_of([4.0, 4.4], {0.1: [2.0, 2.2], 0.2: [2.2, 2.0]})
    assert "costs" not in " ".join(conclusions(flat))


def test_sheets_are_cut_apart_as_they_were_put_together(tmp_path: Path, finished_demo: Path):
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 1), dtype=np.uint8)
    pixels = np.zeros((6, 20), np.uint8)  # two rows of five
    for i, image in enumerate(images):
        y, x = i // 5 * 3, i % 5 * 4
        pixels[y : y + 3, x : x + 4] = image[:, :, 0]
    Image.fromarray(pixels).save(tmp_path / "sheet.png")
    np.testing.assert_array_equal(read_sheet(tmp_path / "sheet.png", 7, 5), images)
    assert read_sheet(tmp_path / "none.png", 7, 5) is None
    with pytest.raises(ValueError, match=r"20×6 pixels, which are not 6 columns and 2 rows"):
        read_sheet(tmp_path / "sheet.png", 7, 6)
    assert load_run(finished_demo).sheets["raw_t=800"].shape == (40, 8, 8, 1)


def test_outlines_lie_around_the_images_marked():
    markup = sheet(np.zeros((4, 8, 8, 1), np.uint8), columns=2, marked=[3])
    assert '<rect x="8.5" y="8.5" width="9" height="9"/>' in markup
    assert markup.count("<rect") == 1
    assert "<svg" not in sheet(np.zeros((4, 8, 8, 3), np.uint8), columns=2)
