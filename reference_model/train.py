"""The training loop, readable top to bottom."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from posthoc_ema import EMA
from reference_model.checkpoint import (
    SNAPSHOTS,
    STATS_FILE,
    load_checkpoint,
    save_checkpoint,
    start_run,
    write_atomically,
)
from reference_model.configs import TrainConfig
from reference_model.data import Dataset, load_dataset
from reference_model.encoders import Encoder, make_encoder
from reference_model.loss import EDM2Loss
from reference_model.lr_schedule import learning_rate
from reference_model.magnitude_log import MAGNITUDES_FILE, recording
from reference_model.precond import Denoiser


def train(
    config: TrainConfig,
    run_dir: str | os.PathLike[str],
    progress: bool = True,
    ema_sigma_rel: Sequence[float] | None = None,
    *,
    stop_at: int | None = None,
    device: str | torch.device = "cpu",
) -> int:
    """Train a network, or continue where an earlier call in `run_dir` stopped.

    A run is a function of its config: on one machine, a run that was stopped and continued
    ends with the same bits as one that was not. SIGTERM and Ctrl-C save a checkpoint and end
    the call early. Reseeds torch's global generator.

    Args:
        config: What to train, and how.
        run_dir: Where config, checkpoint, EMA snapshots and statistics are kept.
        progress: Whether to show a progress bar.
        ema_sigma_rel: EMA lengths to track instead of `config.ema_sigma_rel`.
        stop_at: Save a checkpoint and return once this many images are seen.
        device: Where to train.

    Returns:
        Images seen; less than `config.total_nimg` if stopped early.

    Raises:
        RunDirError: If `run_dir` holds a run with another config.
        ValueError: If network and data set do not fit.

    Source:
        Karras et al. 2024, arXiv:2312.02696, App. B.
    """
    if ema_sigma_rel is not None:
        config = replace(config, ema_sigma_rel=tuple(ema_sigma_rel))
    dataset = load_dataset(config.data, held_out=config.held_out)
    encoder = make_encoder(config.encoder, config.vae)
    check_fit(config, dataset, encoder)
    run_dir = Path(run_dir)
    start_run(run_dir, config)

    torch.manual_seed(config.seed)
    net = Denoiser(config.network).to(device).train()
    loss_fn = EDM2Loss(config.P_mean, config.P_std, config.network.sigma_data)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, betas=config.betas, fused=True)
    ema = EMA(
        sigma_rel=config.ema_sigma_rel,
        snapshots=run_dir / SNAPSHOTS,
        every=config.snapshot_nimg,
        unit="images",
    )
    direct = EMA(config.direct_sigma_rel, unit="images") if config.direct_sigma_rel else None

    nimg, seconds = 0, 0.0
    checkpoint = load_checkpoint(run_dir)
    if checkpoint is not None:
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        ema.load_state_dict(checkpoint["ema"])
        if direct is not None:
            direct.load_state_dict(checkpoint["direct"])
        nimg, seconds = checkpoint["nimg"], checkpoint["seconds"]
    for file in (STATS_FILE, MAGNITUDES_FILE):
        drop_stats_after(run_dir / file, nimg)

    def save() -> None:
        state = {
            "nimg": nimg,
            "seconds": time.monotonic() - started,
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "direct": None if direct is None else direct.state_dict(),
        }
        save_checkpoint(run_dir, state)

    batch_size = config.batch_size
    end = config.total_nimg if stop_at is None else min(stop_at, config.total_nimg)
    started, saved_at = time.monotonic() - seconds, nimg
    losses: list[float] = []
    bad_gradients = 0
    bar = tqdm(
        total=config.total_nimg,
        initial=nimg,
        desc="train",
        unit="img",
        unit_scale=True,
        disable=not progress,
    )
    with bar, stop_signals() as stop, (run_dir / STATS_FILE).open("a") as stats:
        while nimg < end and not stop.is_set():
            # Noise and dropout depend on the position in training alone, not on how it came
            # to be there, so that a resumed run repeats them.
            torch.manual_seed(iteration_seed(config.seed, nimg))
            images, labels = dataset.stream(nimg, batch_size, config.seed)
            x = encoder.encode(images.to(device))
            lr = learning_rate(
                nimg, batch_size, config.ref_lr, config.ref_batches, config.rampup_nimg
            )
            for group in optimizer.param_groups:
                group["lr"] = lr

            due = magnitudes_are_due(nimg, batch_size, config.magnitudes_nimg)
            with recording(due, net, run_dir / MAGNITUDES_FILE, nimg + batch_size, lr):
                # The gradient is that of the sum over pixels, averaged over images.
                loss = loss_fn(net, x, labels.to(device))
                optimizer.zero_grad(set_to_none=True)
                (loss.sum() * (config.loss_scaling / batch_size)).backward()
                bad_gradients += zero_bad_gradients(net)
                optimizer.step()
            nimg += batch_size
            ema.update(net, t=nimg)
            if direct is not None:
                direct.update(net, t=nimg)
            if nimg >= config.total_nimg:
                ema.snapshot()  # the last weights, wherever the interval fell

            losses.append(float(loss.detach().mean()))
            bar.update(batch_size)
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", lr=f"{lr:.4f}", refresh=False)
            if passed_multiple(nimg, batch_size, config.stats_nimg):
                line = {
                    "nimg": nimg,
                    "loss": float(np.mean(losses)),
                    "lr": lr,
                    "bad_gradients": bad_gradients,
                    "seconds": round(time.monotonic() - started, 3),
                }
                print(json.dumps(line), file=stats, flush=True)
                losses, bad_gradients = [], 0
            if passed_multiple(nimg, batch_size, config.checkpoint_nimg):
                save()
                saved_at = nimg

        if nimg > saved_at:
            save()
    return nimg


def zero_bad_gradients(net: nn.Module) -> int:
    """Set NaN and infinite gradients to zero, in place, and count them."""
    bad = 0
    for p in net.parameters():
        if p.grad is not None:
            finite = torch.isfinite(p.grad)
            if not finite.all():
                bad += int((~finite).sum())
                torch.nan_to_num(p.grad, nan=0.0, posinf=0.0, neginf=0.0, out=p.grad)
    return bad


def iteration_seed(seed: int, nimg: int) -> int:
    """Mix run seed and images seen into a seed for torch, alike on every machine."""
    return int(np.random.SeedSequence((seed, nimg)).generate_state(1, np.uint64)[0] >> 1)


def passed_multiple(nimg: int, step: int, interval: int) -> bool:
    """Whether the step that ended at `nimg` reached or passed a multiple of `interval`."""
    return nimg // interval > (nimg - step) // interval


def magnitudes_are_due(nimg: int, batch_size: int, interval: int) -> bool:
    """Whether the step that starts at `nimg` is to be recorded: the first, and at intervals."""
    if interval == 0:
        return False
    return nimg == 0 or passed_multiple(nimg + batch_size, batch_size, interval)


def check_fit(config: TrainConfig, dataset: Dataset, encoder: Encoder) -> None:
    """Refuse a network that does not take the data set's images as they are encoded.

    Raises:
        ValueError: If shapes or numbers of classes differ.
    """
    net = config.network
    has = encoder.input_shape(dataset.shape)
    if net.input_shape != has:
        encoded = "" if has == dataset.shape else f", encoded by {config.encoder!r},"
        raise ValueError(
            f"the network takes images of shape {net.input_shape}, data set {config.data!r}"
            f"{encoded} has {has}; set img_channels and img_resolution accordingly"
        )
    if dataset.source.latent != (config.encoder == "latents"):
        kind = "latents" if dataset.source.latent else "pixels"
        raise ValueError(
            f"data set {config.data!r} holds {kind}, which the encoder {config.encoder!r} does not "
            "take; set encoder accordingly (`prepare --vae` makes latents of pixels)"
        )
    if net.label_dim not in (0, dataset.num_classes):
        raise ValueError(
            f"the network takes {net.label_dim} classes, data set {config.data!r} has "
            f"{dataset.num_classes}; set label_dim to that, or to 0 to ignore classes"
        )


def drop_stats_after(path: Path, nimg: int) -> None:
    """Remove lines that a run wrote after the checkpoint it now continues from."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        # A line cut short by a crash was written after any checkpoint.
        kept = [s for s in lines if s.endswith("\n") and json.loads(s)["nimg"] <= nimg]
        if kept != lines:
            write_atomically(path, lambda file: file.write("".join(kept).encode()))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn SIGTERM and Ctrl-C into an event; a second Ctrl-C interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def request(number: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for s in before:
        signal.signal(s, request)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
