"""Numbers of the page on tracks and budget: each row is computed once more."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from helpers import ROOT, assert_at_most

from posthoc_ema import Plan, plan

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "choosing.md"
WHOLE = (0.01, 0.25)


def rows(first_column: str) -> list[list[str]]:
    """Rows of the table with this first column, as cells."""
    text = PAGE.read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| {first_column} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


def assert_shown(shown: str, value: float) -> None:
    """Two digits."""
    # Half a unit of the second, and a little for other machines' rounding.
    last = 0.1 * 10.0 ** int(shown.partition("e")[2])
    assert_at_most(abs(float(shown) - value), 0.52 * last, reason="rounded for the page")


def tracks_of(made: Plan) -> str:
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in made.sigma_rel)


def planned(budget: float, lengths: tuple[float, float] = WHOLE, **options: Any) -> Plan:
    return plan(budget, lengths, t_end=100_000, **options)


@pytest.mark.parametrize("row", rows("files"), ids=lambda row: row[0])
def test_how_many(row: list[str]) -> None:
    files, tracks, worst, even = row
    made = planned(int(files))
    assert tracks_of(made) == tracks
    assert_shown(worst, made.worst_error)
    assert_shown(even, max(made.even_errors))


@pytest.mark.parametrize("row", rows("lengths wanted"), ids=lambda row: row[0])
def test_which_lengths(row: list[str]) -> None:
    lengths, tracks, worst, default = row
    low, high = map(float, lengths.split(" to "))
    made = planned(16, (low, high))
    assert tracks_of(made) == tracks
    assert_shown(worst, made.worst_error)
    assert_shown(default, planned(16, (low, high), tracks=(0.05, 0.1)).worst_error)


@pytest.mark.parametrize("row", rows("`--encoding`"), ids=lambda row: row[0])
def test_encodings(row: list[str]) -> None:
    encoding, files, tracks, worst = row
    made = planned(20e9, parameters=280e6, encoding=encoding)
    assert (tracks_of(made), made.snapshots) == (tracks, int(files))
    assert_shown(worst, made.worst_error)


@pytest.mark.skipif(
    os.environ.get("OMP_NUM_THREADS") != "1", reason="they are those of one thread: `make test`"
)
def test_single_numbers_of_the_text() -> None:
    text = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8"))
    default = planned(32, tracks=(0.05, 0.1))
    shown = [
        ("have a worst error of ", default.worst_error),
        ("(`--budget 32 --tracks 0.05,0.1`), ", max(default.even_errors)),
        ("error is ", max(planned(64, (0.02, 0.25), tracks=(0.05, 0.1)).even_errors)),
        ("one track ", planned(36, tracks=1).worst_error),
        ("two ", planned(36, tracks=2).worst_error),
        ("three ", planned(36, tracks=3).worst_error),
        ("`--movement constant` ", planned(32, movement="constant").worst_error),
        ("`inverse-sqrt` ", planned(32, movement="inverse-sqrt").worst_error),
        ("`linear` ", planned(32, movement="linear").worst_error),
        ("`cosine` ", planned(32, movement="cosine").worst_error),
        ("not knowing it, ", planned(32).worst_error),
    ]
    for words, value in shown:
        (number,) = re.findall(re.escape(words) + r"(\d\.\de-\d)", text)
        assert_shown(number, value)


@pytest.mark.parametrize("shown", ["1.4e-3", "1.6e-3", "1.5e-2"])
def test_wrong_numbers_are_noticed(shown: str) -> None:
    assert_shown("1.5e-3", 0.00154)
    with pytest.raises(AssertionError):
        assert_shown(shown, 0.001505)
