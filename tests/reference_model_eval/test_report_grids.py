"""What the report says about times, guidance, single tensors and further measures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from reference_model import report_grids
from reference_model.demo import QUICK
from reference_model.held_out_loss import LOSS
from reference_model.points import Point, PointGuide
from reference_model.report import MAX_PIXEL_BYTES, _within_budget, load_run, render, write_report
from reference_model.report_grids import command_for, guidance, measures, sensitivity, times
from reference_model.sweep_record import DISTANCE, Measurement, SweepRecord, load_record

GUIDE = PointGuide(2.0, 0.25, 800.0, "run1")


def record_of(points: dict[Point, list[float]], measure: str = DISTANCE) -> SweepRecord:
    record = SweepRecord({"run_id": "run1"})
    for point, values in points.items():
        record.add(Measurement(point, {measure: tuple(values)}))
    return record


def check_svgs(markup: str) -> int:
    """Number of drawings, all of them well-formed."""
    drawings = re.findall(r"<svg viewBox=\"0 0 \d+ \d+\" width.*?</svg>", markup, re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    return len(drawings)


def test_times_have_a_curve_each_and_a_drift_only_beyond_the_noise():
    clear = record_of(
        {
            Point(0.05, 102_400): [4.0, 4.2],
            Point(0.2, 102_400): [6.0, 6.2],
            Point(0.05, 524_288): [2.0, 2.2],
            Point(0.2, 524_288): [1.0, 1.1],
            Point(0.1, 409_600): [1.5, 1.6],  # a single length is no curve
        }
    )
    text = times(clear)
    assert "The best length moved from 0.05 to 0.2." in text
    assert "<td>100Ki</td><td>0.05</td>" in text
    assert "<td>512Ki</td><td>0.2</td>" in text
    assert "400Ki" not in text
    assert check_svgs(text) == 2  # for wide and narrow windows
    noisy = record_of(
        {
            Point(0.05, 102_400): [4.0, 4.2],
            Point(0.2, 102_400): [3.9, 4.4],
            Point(0.05, 524_288): [2.0, 2.2],
            Point(0.2, 524_288): [1.0, 1.1],
        }
    )
    assert "did not move by more than the noise allows" in times(noisy)
    assert times(record_of({Point(0.1, 5): [1.0], Point(0.2, 5): [2.0]})) == ""


def guided_record(guided: list[float], alone: list[float]) -> SweepRecord:
    return record_of(
        {
            Point(0.1, 800): alone,
            Point(0.05, 800): [9.0, 9.2],
            Point(0.1, 800, GUIDE): guided,
            Point(0.05, 800, GUIDE): [8.0, 8.1],
            Point(0.1, 800, replace(GUIDE, guidance=3.0)): [7.0, 7.1],
            Point(0.1, 800, replace(GUIDE, t=400.0)): [5.0, 5.1],
        }
    )


@pytest.mark.parametrize(
    ("guided", "alone", "words"),
    [
        ([2.0, 2.1], [4.0, 4.2], "guidance is worth 50 %"),
        ([4.0, 4.1], [2.0, 2.2], "here guidance costs more than it gives"),
        ([3.0, 4.0], [3.1, 3.8], "the measurement cannot tell them apart"),
    ],
)
def test_guidance_is_judged_by_paired_differences(
    finished_demo: Path, guided: list[float], alone: list[float], words: str
):
    text = guidance(load_run(finished_demo), guided_record(guided, alone))
    assert words in text


def test_guidance_has_a_table_for_each_guide_with_the_lowest_outlined(finished_demo: Path):
    text = guidance(load_run(finished_demo), guided_record([2.0, 2.1], [4.0, 4.2]))
    assert re.findall(r"<h3>Guide: (.*?)</h3>", text) == [
        "σ<sub>rel</sub> 0.25 after 400 images",
        "σ<sub>rel</sub> 0.25",
    ]
    assert text.count('class="lowest"') == 1
    assert re.search(r'class="lowest"[^>]*title="2.05 ± 0.05"', text)
    # Without guidance: what the curve holds, in the column of strength one.
    assert text.count("4.10<small>") == 2
    assert "w = 1</th>" in text
    assert check_svgs(text) == 2
    assert guidance(load_run(finished_demo), record_of({Point(0.1, 800): [1.0]})) == ""


def test_single_tensors_are_compared_in_pairs():
    base = Point(0.1, 800)

    def changed(pattern: str, length: float) -> Point:
        return replace(base, changed=((pattern, length),))

    record = record_of(
        {
            base: [1.0, 2.0],
            changed("unet.enc.a.*", 0.05): [0.9, 1.89],
            changed("unet.enc.a.*", 0.2): [1.2, 1.9],
            changed("unet.dec.b.*", 0.2): [1.1, 2.1],
        },
        LOSS,
    )
    text = sensitivity(record)
    assert "1 of 3 changes lower the held-out loss by more than two standard errors" in text
    assert "<code>unet.enc.a.*</code> at 0.05, by 7.0 %" in text
    assert check_svgs(text) == 2
    assert text.index("enc.a</text>") < text.index("dec.b</text>"), "in the network's order"
    record = record_of({base: [1.0, 2.0], changed("unet.enc.a.*", 0.05): [1.1, 2.2]}, LOSS)
    assert "Of 1 changes, none lowers the held-out loss" in sensitivity(record)
    # Without the base there is nothing to compare with.
    assert sensitivity(record_of({changed("a", 0.2): [1.0, 2.0]}, LOSS)) == ""


def test_measures_that_the_judge_adds_are_drawn_and_tabled(run_dir: Path):
    data = json.loads((run_dir / "sweep.json").read_text())
    for i, m in enumerate(data["measurements"]):
        m["scores"]["recall <k=5>"] = [0.5 + 0.01 * i, 0.52 + 0.01 * i]
    (run_dir / "sweep.json").write_text(json.dumps(data))
    record = load_record(run_dir)
    assert record is not None
    assert check_svgs(measures(record)) == 3  # precision and recall are always there
    page = render(load_run(run_dir))
    assert "Recall &lt;k=5&gt;</th>" in page
    assert "0.510 ± 0.010" in page
    assert "recall <k" not in page


def test_the_command_repeats_the_point():
    where = Path("runs/my run")
    assert command_for(where, Measurement(Point(0.07, 800), {})) == (
        "python -m reference_model generate --run-dir 'runs/my run' --sigma-rel 0.07 "
        "--out 'runs/my run'/best"
    )
    guide = replace(GUIDE, t=400.0, interval=(0.3, 2.0))
    text = command_for(Path("r"), Measurement(Point(0.07, 800, guide), {}))
    assert "--guidance 2 --guidance-sigma-rel 0.25 --guidance-t 400" in text
    assert "--guidance-interval 0.3,2" in text
    assert "--guidance-run-dir" not in text
    other = replace(GUIDE, run_id="run2", run_dir="runs/small")
    text = command_for(Path("r"), Measurement(Point(0.07, 800, other), {}))
    assert "--guidance-run-dir runs/small --guidance-t 800" in text


def test_a_page_of_many_large_images_shows_fewer_rows():
    images = np.zeros((60, 64, 64, 3), np.uint8)
    sheets = _within_budget({str(i): images for i in range(20)})
    shown = {len(kept) for kept in sheets.values()}
    assert shown == {20}  # 20 sheets of two rows are 4.9 MB, of three 7.4 MB
    assert sum(kept.nbytes for kept in sheets.values()) <= MAX_PIXEL_BYTES
    assert len(_within_budget({"one": images})["one"]) == 60
    assert _within_budget({}) == {}


def test_a_record_without_grids_has_none_of_these_sections(run_dir: Path):
    record = load_record(run_dir)
    assert record is not None
    assert len(report_grids.grids(load_run(run_dir), record)) == 1  # precision and recall
    assert len(record.averages) == len(QUICK.sigma_rels)
    page = write_report(run_dir).read_text()
    for section in ("times", "guidance", "sensitivity"):
        assert f'id="{section}"' not in page
