"""How much is asked of a file system that is far away: bytes, requests, time, memory."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from stores import ObjectStore

from posthoc_ema import EMA, SnapshotStore, predict_error, reconstruct

TIMES, LATENCY = 6, 0.02
LARGE, SMALL = 3_000_000, 1000
FILE = 4 * (LARGE + SMALL)
HEADER = 128 << 10  # fetched of each file, whatever its length is


def snapshots(encoding: str = "float32", **shapes: Any) -> ObjectStore:
    """A run of six times and two tracks, 12 MB a file."""
    fs, rng = ObjectStore(), np.random.default_rng(0)
    shapes = shapes or {"large": (LARGE,), "small": (SMALL,)}
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    ema = EMA(snapshots=fs.at("/ema"), every=1, encoding=encoding)
    for _ in range(TIMES):
        for values in weights.values():
            values += 0.01
        ema.update(weights)
    fs.reset()
    fs.latency = LATENCY
    return fs


@pytest.fixture(scope="module")
def run() -> ObjectStore:
    return snapshots()


def test_a_listing_is_one_request_and_one_for_each_header(run: ObjectStore) -> None:
    log, store = run.reset(), SnapshotStore(run.at("/ema"))
    started = time.perf_counter()
    assert len(store.list()) == 2 * TIMES
    assert time.perf_counter() - started < 5 * LATENCY, "headers are read at the same time"
    assert len(log.of("list")) == 1
    assert len(log.of("read")) == 2 * TIMES
    assert log.bytes_read <= 2 * TIMES * HEADER
    store.list()
    assert len(log.of("list")) == 2
    assert len(log.of("read")) == 2 * TIMES, "known headers are not read again"


def test_one_small_tensor_leaves_the_rest_where_it_is(run: ObjectStore) -> None:
    store = SnapshotStore(run.at("/ema"))
    store.list()
    log = run.reset()
    reconstruct(store, 0.07, names="small")
    # The sample by which the movement is judged, of all tensors, is most of it.
    assert log.bytes_read < 0.25 * 2 * TIMES * FILE
    sample = log.bytes_read
    log = run.reset()
    predict_error(store, 0.07)
    assert sample - log.bytes_read == 2 * TIMES * 4 * SMALL
    log = run.reset()
    store.list()[0].read("small")
    assert log.bytes_read == 4 * SMALL


def test_a_pass_takes_few_requests_and_many_at_a_time(run: ObjectStore) -> None:
    store = SnapshotStore(run.at("/ema"))
    store.list()
    predict_error(store, 0.07)
    log = run.reset()
    predict_error(store, 0.07)
    sampling = len(log.requests), log.bytes_read
    log = run.reset()
    started = time.perf_counter()
    reconstruct(store, 0.07)
    seconds = time.perf_counter() - started
    requests, read = len(log.requests) - sampling[0], log.bytes_read - sampling[1]
    assert read == 2 * TIMES * FILE, "each byte once"
    assert requests <= 2 * TIMES * (-(-FILE // (4 << 20)) + 1), "of four megabytes or more"
    assert log.at_once >= 16
    # One after the other, the requests alone would take this long; it must not come near.
    assert seconds < 0.25 * LATENCY * len(log.requests)


def beyond_the_sample(run: ObjectStore, sigma_rel: Any, **options: Any) -> tuple[Any, int]:
    """A reconstruction, and the bytes read for it beside the sample that estimates rest on."""
    store = SnapshotStore(run.at("/ema"))
    store.list()
    log = run.reset()
    predict_error(store, sigma_rel)
    sampled = log.bytes_read
    log = run.reset()
    result = reconstruct(store, sigma_rel, **options)
    return result, log.bytes_read - sampled


def test_stored_averages_among_the_targets_are_not_read_again(run: ObjectStore) -> None:
    """Those of the last time come back bit for bit, out of the same pass."""
    _, read = beyond_the_sample(run, [0.05, 0.07, 0.1])
    assert read == 2 * TIMES * FILE, "each byte once"


def test_snapshots_that_do_not_count_stay_where_they_are(run: ObjectStore) -> None:
    result, read = beyond_the_sample(run, 0.01, slack=0.1)
    used = np.count_nonzero(result.coefficients)
    assert 1 < used < 2 * TIMES
    assert read == used * FILE


def test_many_lengths_by_pattern_take_no_more_requests(run: ObjectStore) -> None:
    """Each tensor is a sequence of blocks of its own; they are fetched together all the same."""
    many = snapshots(**{f"{kind}{k}": (5000,) for k in range(40) for kind in "ab"})
    store = SnapshotStore(many.at("/ema"))
    store.list()
    log = many.reset()
    predict_error(store, 0.07)
    sampling = len(log.requests)
    log = many.reset()
    reconstruct(store, {"a*": 0.05, "b*": 0.1})
    assert len(log.requests) - sampling <= 2 * 2 * TIMES


def test_buffers_come_together() -> None:
    fs = ObjectStore()
    ema = EMA(snapshots=fs.at("/ema"), every=1)
    buffers = {f"count{k}": np.array([k] * 3) for k in range(50)}
    for step in range(1, 4):
        ema.update({"w": np.full(100, float(step)), **buffers})
    (*_, last) = SnapshotStore(fs.at("/ema")).list()
    log = fs.reset()
    assert len(last.copy_sources()) == 50
    assert len(log.of("read")) == 1


def test_verifying_reads_large_pieces(run: ObjectStore) -> None:
    store = SnapshotStore(run.at("/ema"))
    snapshot = store.list()[0]
    log = run.reset()
    snapshot.verify()
    assert log.bytes_read == FILE
    assert len(log.of("read")) <= -(-FILE // (4 << 20))


@pytest.mark.parametrize("encoding", ["float32", "delta8"])
def test_writing_takes_few_requests(encoding: str) -> None:
    fs = ObjectStore()
    ema = EMA(snapshots=fs.at("/ema"), every=1, encoding=encoding)
    for step in range(1, 12):
        log = fs.reset()
        ema.update({"w": np.full(1000, float(step)) + np.arange(1000)})
    files = len(log.of("put"))
    assert files == (2 if encoding == "float32" else 4)
    assert len(log.of("list")) + len(log.of("read")) <= 8 * 2, "whatever lies there already"
    assert len(log.of("delete")) == files - 2
