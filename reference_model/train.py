"""The training loop, readable top to bottom."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from posthoc_ema import EMA
from reference_model.checkpoint import (
    SNAPSHOTS,
    RunDirError,
    load_checkpoint,
    save_checkpoint,
    start_run,
)
from reference_model.configs import TrainConfig
from reference_model.data import Dataset, load_dataset
from reference_model.distributed import processes
from reference_model.draws import Draws, draw
from reference_model.dropout import image_seeds
from reference_model.encoders import Encoder, make_encoder
from reference_model.loss import EDM2Loss
from reference_model.lr_schedule import learning_rate
from reference_model.magnitude_log import MAGNITUDES_FILE, recording
from reference_model.parallel import (
    Alone,
    parallelize,
    sum_of_squares,
    zero_bad_gradients,
)
from reference_model.precond import Denoiser
from reference_model.run_record import describe_data, record_start
from reference_model.run_state import RunState, make_optimizer
from reference_model.signals import stop_signals
from reference_model.stats import Window, drop_stats_after, stats_writer


def train(
    config: TrainConfig,
    run_dir: str | os.PathLike[str],
    progress: bool = True,
    ema_sigma_rel: Sequence[float] | None = None,
    *,
    stop_at: int | None = None,
    device: str | torch.device = "cpu",
    micro_batch: int | None = None,
    parallel: str = "ddp",
    tensorboard: bool = False,
) -> int:
    """Train a network, or continue where an earlier call in `run_dir` stopped.

    A run is a function of its config: on one machine, a run that was stopped and continued
    ends with the same bits as one that was not. Other micro-batches or another number of
    processes give the same run up to the order of sums. Under torchrun all processes call this
    alike. SIGTERM and Ctrl-C, to any process, save a checkpoint and end the call early. Reseeds
    torch's global generator.

    Args:
        config: What to train, and how.
        run_dir: Where config, checkpoint, EMA snapshots and statistics are kept; the same
            directory for all processes.
        progress: Whether to show a progress bar.
        ema_sigma_rel: EMA lengths to track instead of `config.ema_sigma_rel`.
        stop_at: Save a checkpoint and return once this many images are seen.
        device: Where to train: `cuda` is one GPU for each process.
        micro_batch: Images that one process takes through the network at once; `None`: all of
            its share of the batch.
        parallel: How several processes share the model: `ddp`, a copy in each, or `fsdp`, a
            shard in each.
        tensorboard: Whether to write statistics for TensorBoard too.

    Returns:
        Images seen; less than `config.total_nimg` if stopped early.

    Raises:
        RunDirError: If `run_dir` holds a run with another config, or the data set is another.
        ValueError: If network and data set do not fit, or the batch cannot be divided.
        OtherProcessError: If another process failed, and says why itself.

    Source:
        Karras et al. 2024, arXiv:2312.02696, App. B.
    """
    if ema_sigma_rel is not None:
        config = replace(config, ema_sigma_rel=tuple(ema_sigma_rel))
    run_dir, batch_size = Path(run_dir), config.batch_size
    with processes(device) as group:
        with group.together():
            at_once = images_at_once(batch_size, group.count, micro_batch)
            dataset = load_dataset(config.data, held_out=config.held_out)
            encoder = make_encoder(config.encoder, config.vae)
            check_fit(config, dataset, encoder)
            if group.is_first:
                start_run(run_dir, config, describe_data(dataset.source))

        torch.manual_seed(config.seed)
        net = Denoiser(config.network).to(group.device).train()
        loss_fn = EDM2Loss(config.P_mean, config.P_std, config.network.sigma_data)
        model = parallelize(net, group, parallel)
        optimizer = make_optimizer(net, config.betas)
        ema = EMA(
            sigma_rel=config.ema_sigma_rel,
            snapshots=run_dir / SNAPSHOTS,
            every=config.snapshot_nimg,
            unit="images",
        )
        direct = EMA(config.direct_sigma_rel, unit="images") if config.direct_sigma_rel else None
        window = Window(group.device)
        run = RunState(model, optimizer, ema, direct, window)
        resume(run, run_dir)

        end = config.total_nimg if stop_at is None else min(stop_at, config.total_nimg)
        if run.nimg >= end:
            return run.nimg
        if group.is_first:
            about = {"processes": group.count, "parallel": parallel, "micro_batch": micro_batch}
            record_start(run_dir, nimg=run.nimg, device=str(group.device), **about)
            drop_stats_after(run_dir / MAGNITUDES_FILE, run.nimg)
        # Of its own images; a process that holds shards sees no whole layer.
        records = group.is_first and parallel != "fsdp"
        clock = Clock(run.nimg, run.seconds)
        saved_at, recent = run.nimg, deque[Tensor](maxlen=20)
        bar = tqdm(
            total=config.total_nimg,
            initial=run.nimg,
            desc="train",
            unit="img",
            unit_scale=True,
            disable=not (progress and group.is_first),
        )
        writer = stats_writer(run_dir, run.nimg, tensorboard=tensorboard, active=group.is_first)
        with bar, stop_signals() as stop, writer as write:
            while run.nimg < end and not group.any(stop.is_set()):
                images, labels = dataset.stream(
                    run.nimg, batch_size, config.seed, rank=group.rank, world_size=group.count
                )
                x, labels = encoder.encode(images.to(group.device)), labels.to(group.device)
                draws = draw(
                    loss_fn, config.network.input_shape, run.nimg, batch_size, config.seed, group
                )
                lr = learning_rate(
                    run.nimg, batch_size, config.ref_lr, config.ref_batches, config.rampup_nimg
                )
                for param_group in optimizer.param_groups:
                    param_group["lr"] = lr

                due = records and magnitudes_are_due(run.nimg, batch_size, config.magnitudes_nimg)
                with recording(due, net, run_dir / MAGNITUDES_FILE, run.nimg + batch_size, lr):
                    optimizer.zero_grad(set_to_none=True)
                    loss = accumulate_gradients(model, loss_fn, x, labels, draws, at_once, config)
                    bad_gradients = zero_bad_gradients(model.gradients())
                    optimizer.step()
                run.nimg += batch_size
                ema.update(net, t=run.nimg)
                if direct is not None:
                    direct.update(net, t=run.nimg)
                if run.nimg >= config.total_nimg:
                    ema.snapshot()  # the last weights, wherever the interval fell

                run.window.add(loss, bad_gradients)
                recent.append(loss * group.count)
                if bar.update(batch_size):  # now and then: reading the loss waits for a GPU
                    shown = float(torch.stack(list(recent)).mean())
                    bar.set_postfix(loss=f"{shown:.3f}", lr=f"{lr:.4f}", refresh=False)
                if passed_multiple(run.nimg, batch_size, config.stats_nimg):
                    line = measure(run, lr, config.loss_scaling, clock)
                    write(line)
                    run.window.reset()
                run.seconds = clock.seconds()
                if passed_multiple(run.nimg, batch_size, config.checkpoint_nimg):
                    save_checkpoint(run_dir, run.to_dict(), group)
                    saved_at = run.nimg

            if run.nimg > saved_at:
                save_checkpoint(run_dir, run.to_dict(), group)
        return run.nimg


def accumulate_gradients(
    model: Alone,
    loss_fn: EDM2Loss,
    x: Tensor,
    labels: Tensor,
    draws: Draws,
    at_once: int,
    config: TrainConfig,
) -> Tensor:
    """Compute gradients of a step: of the sum over pixels, averaged over the images of the batch.

    Args:
        model: The network, with gradients cleared.
        loss_fn: The loss.
        x: This process's images, `[B, C, H, W]`.
        labels: Their classes, `[B, K]`.
        draws: Their noise.
        at_once: Images of a micro-batch.
        config: Size of the batch, and the scale of the loss.

    Returns:
        This process's share of the mean loss over batch and pixels, `[]`, detached.
    """
    total = x.new_zeros(())
    for start in range(0, len(x), at_once):
        part = slice(start, start + at_once)
        first, last = start == 0, start + at_once >= len(x)
        seeds = image_seeds(model.net, draws.dropout_seeds[part])
        with model.micro_batch(first=first, last=last), seeds:
            loss = loss_fn.at(
                model.call, x[part], draws.sigma[part], draws.noise[part], labels[part]
            ).sum()
            (loss * (config.loss_scaling * model.scale / config.batch_size)).backward()
        total += loss.detach()
    model.finish()
    return total / (config.batch_size * x[0].numel())


def measure(run: RunState, lr: float, loss_scaling: float, clock: Clock) -> dict[str, float]:
    """Return a line of statistics since the last one; all processes must take part."""
    window, model = run.window, run.model
    squares = float(sum_of_squares(model.gradients()))
    bad_gradients, squares = model.total([float(window.bad_gradients), squares])
    [loss] = model.processes.total([float(window.loss)])
    return {
        "nimg": run.nimg,
        "loss": loss / window.steps,
        "lr": lr,
        "bad_gradients": int(bad_gradients),
        "grad_norm": math.sqrt(squares) / loss_scaling,
        "images_per_second": round(clock.rate(run.nimg), 3),
        "seconds": round(clock.seconds(), 3),
    }


class Clock:
    """Time that a run has taken, over all its starts.

    Args:
        nimg: Images seen so far.
        seconds: Time so far.
    """

    def __init__(self, nimg: int, seconds: float) -> None:
        self._zero = time.monotonic() - seconds
        self._last = nimg, seconds

    def seconds(self) -> float:
        """Time up to now."""
        return time.monotonic() - self._zero

    def rate(self, nimg: int) -> float:
        """Images a second since the last call."""
        (before, then), self._last = self._last, (nimg, self.seconds())
        return (nimg - before) / max(self._last[1] - then, 1e-9)


def resume(run: RunState, run_dir: Path) -> None:
    """Load the checkpoint of a run directory, if there is one, in all processes.

    Raises:
        RunDirError: If it cannot be read, or processes do not find the same one.
    """
    group = run.model.processes
    with group.together():
        checkpoint = load_checkpoint(run_dir, sharded=True)
        if checkpoint is not None:
            run.load(checkpoint)
    found = group.gather(run.nimg)
    if len(set(found)) > 1:
        raise RunDirError(
            f"the processes find checkpoints of {run_dir} at different numbers of images, "
            f"{found}; the run directory must lie on a file system that all machines share"
        )


def images_at_once(batch_size: int, count: int, micro_batch: int | None) -> int:
    """Return how many images a process takes through the network at once, at most.

    Args:
        batch_size: Images of a step.
        count: Number of processes.
        micro_batch: What was asked for; `None`: all that a process has.

    Raises:
        ValueError: If processes cannot have equal shares, or a micro-batch is empty.
    """
    if batch_size % count:
        raise ValueError(
            f"batch_size {batch_size} cannot be divided among {count} processes evenly; start a "
            "number of processes that divides it"
        )
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1 (got {micro_batch})")
    return min(micro_batch or batch_size, batch_size // count)


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
