"""The training loop, for every objective, on CPU and CUDA.

A step's randomness follows from (seed, step) and nothing is carried between steps but weights,
averages and optimizer moments. A run that is stopped and started again is therefore, on the CPU,
bit for bit the run that was never stopped.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from anystep import checkpoint, ema, parallel
from anystep.config import TrainConfig, changes, config_json, pick_device
from anystep.data import Examples, Loaded, Stored, mirror, seeded
from anystep.errors import UserError
from anystep.log import MetricsLog
from anystep.objectives import Batch
from anystep.parallel import Processes
from anystep.registry import name_of
from anystep.report import Look
from anystep.spec import Model
from anystep.state import State, initial_state, load_teacher, save
from anystep.trackers import check_trackers, start_trackers

CONFIG = "config.json"
METRICS = "metrics.jsonl"
INTERRUPTED = 130  # exit code of a run stopped by Ctrl-C and saved


class Diverged(UserError):
    """A loss or gradient was not finite."""


def train(config: TrainConfig, *, bar: bool = True) -> bool:
    """Train, or go on training, the run at `config.out`.

    Args:
        config: the run.
        bar: show a progress bar.

    Returns:
        True when the run is complete, False when it was interrupted and saved.

    Raises:
        UserError: bad data or config, a config that differs from the run's, or a loss that is
            not finite; the message says what to do and the last checkpoint is intact.
    """
    check_trackers(config.log.trackers)
    device = pick_device(config.device)
    shard_dtype = torch.bfloat16 if low_precision(config, device) else None
    with parallel.joined(config.parallel, device, shard_dtype) as processes:
        return train_together(config, device, processes, bar)


def train_together(
    config: TrainConfig, device: torch.device, processes: Processes, bar: bool
) -> bool:
    """`train`, of the processes of a run."""
    splits = config.data.load()
    check_method(config, splits)
    found = checkpoint.checkpoints(config.out)
    state = initial_state(config, splits, device, processes, new=not found)
    if not found:
        load_teacher(state, config)
    if processes.first:
        open_run(config)
        checkpoint.sweep(config.out)
    processes.wait()
    if found:
        state.restore(found[-1])
    if state.step >= config.steps:
        return True

    feed = splits.train.feed(config.batch, config.seed)
    feed.seek(state.position)
    reference = config.data.reference(splits) if config.log.look_every else None
    look = Look(config.log, reference, config.out if processes.first else None, device)
    average = Model(processes.share(state.average), state.model.spec)
    history: list[dict[str, Tensor]] = []
    with (
        interruptible() as stop,
        open_log(config, state.step, processes.first) as log,
        progress_bar(config, state.step, bar and processes.first) as progress,
        ThreadPoolExecutor(1) as reader,  # reads a step ahead
    ):
        coming = reader.submit(feed, state.step)
        clock, done = time.perf_counter(), False
        while not done:
            if state.step == config.phase(state.step)[0]:
                state.begin_phase(config)
            generator = seeded(config.seed, state.step, device=device)
            stored = coming.result()
            coming = reader.submit(feed, state.step + 1)
            batch = load_batch(config, splits.train, stored, generator, device)
            history.append(training_step(state, batch, config, generator))
            state.position = stored.position
            state.step += 1
            progress.update()

            done = state.step == config.steps
            if processes.alone or state.step % config.log.every == 0:  # asking others takes time
                done = processes.any(bool(stop)) or done
            look_now = look.due(state.step)
            if (
                done
                or look_now
                or any(state.step % n == 0 for n in (config.log.every, config.log.save_every))
            ):
                metrics = summarise(history, state.step, config)
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                metrics["examples_per_second"] = len(history) * config.batch / seconds
                metrics["forwards"] = state.counter.rows
                state.seconds += seconds
                log.write(state.step, metrics)
                progress.set_postfix_str(short(metrics), refresh=False)
                history.clear()
            if done or state.step % config.log.save_every == 0:
                save(state, config)
            if look_now:
                log.write(state.step, look(average, state.step))
                clock = time.perf_counter()
    return state.step >= config.steps and not stop


def check_method(config: TrainConfig, splits: Loaded) -> None:
    """Raise `UserError` when a teacher, pairs or steps are missing, or a teacher not wanted."""
    wanted, method = config.objective.TEACHER, name_of(config.objective)
    if wanted == "required" and config.teacher is None:
        raise UserError(f"{method} learns from a trained model: name it with --teacher RUN")
    if wanted == "none" and config.teacher is not None:
        raise UserError(f"{method} has no teacher; leave --teacher out")
    if config.steps < config.objective.phases:
        raise UserError(
            f"{method} has {config.objective.phases} phases and needs as many steps, "
            f"not {config.steps}"
        )
    if config.flip and splits.train.vae is not None:
        raise UserError(
            "a mirrored latent is not the latent of the mirrored picture: leave --flip out, and "
            "give it to anystep encode"
        )
    if splits.train.guidance != 1 and not config.objective.PAIRS:
        raise UserError(
            f"these pairs were made with guidance {splits.train.guidance}, which {method} would "
            "not know of; train reflow on them"
        )
    if config.objective.PAIRS and splits.train.x0 is None:
        raise UserError(
            f"{method} learns from pairs of noise and data: anystep pairs RUN --out FOLDER makes "
            "them, anystep train pairs --data.path FOLDER trains on them"
        )


def open_run(config: TrainConfig) -> None:
    """Make the run's folder, or check that the one there is of the same config.

    Raises:
        UserError: it is another run's; the differing fields are named.
    """
    path, new = config.out / CONFIG, config_json(config)
    if path.exists():
        changed = changes(checkpoint.read_json(path), new)
        if changed:
            raise UserError(
                f"{config.out} is a run of another config ({'; '.join(changed)}): "
                f"choose another --out, or remove it to start again"
            )
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, new)


def open_log(config: TrainConfig, step: int, first: bool) -> MetricsLog:
    """The log of a run that goes on from `step`; of the processes of a run, the first one's."""
    if not first:
        return MetricsLog(None, step)
    trackers = start_trackers(
        config.log.trackers, config.out, step, config.log.project, config_json(config)
    )
    return MetricsLog(config.out / METRICS, step, trackers)


def load_batch(
    config: TrainConfig,
    data: Examples,
    stored: Stored,
    generator: torch.Generator,
    device: torch.device,
) -> Batch:
    """The stored examples on the device, mirrored at random if the config says so."""
    x, cond, x0 = (
        None if column is None else column.to(device, non_blocking=True) for column in stored[:3]
    )
    assert x is not None
    x1 = data.draw(x, generator)
    if config.flip and x0 is not None:  # a pair is mirrored as one
        x1, x0 = mirror(torch.cat([x1, x0], 1), generator).chunk(2, 1)
    elif config.flip:
        x1 = mirror(x1, generator)
    return Batch(x1, cond, x0)


def training_step(
    state: State, batch: Batch, config: TrainConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """One update of weights and averages; returns scalars, still on the device."""
    net, optimizer = state.model.net, state.optimizer
    first, length = config.phase(state.step)
    age = state.step - first
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.rate(age, length)
    parts = []
    for part in split_batch(batch, config.accumulate):
        with autocast(config, batch.x1.device):
            loss = config.objective(state.called, part, state.step / config.steps, generator)
        total = loss.per_example.sum() / len(batch.x1)
        total.backward()  # type: ignore[no-untyped-call]
        parts.append({"loss": loss.per_example.detach().mean()} | loss.metrics)
    bound = config.optimizer.clip or math.inf
    norm = parallel.whole(nn.utils.clip_grad_norm_(net.parameters(), bound))
    optimizer.step()
    optimizer.zero_grad()
    ema.update(state.average, net, ema.warmed_up(config.ema, age))
    if state.target is not None:
        decay = config.objective.target_ema
        assert decay is not None
        ema.update(state.target, net, ema.warmed_up(decay, age))
    return mean_of(parts) | {"grad_norm": norm.detach()}


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch cut into `parts` of nearly equal size."""
    columns = [
        [None] * parts if column is None else column.tensor_split(parts) for column in batch
    ]
    return [Batch(*row) for row in zip(*columns, strict=True)]


def mean_of(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over a list of steps; NaN, "no example", does not count."""
    names = metrics[0]
    return {k: torch.stack([m[k].float() for m in metrics]).nanmean() for k in names}


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the config asks for it, by default on CUDA."""
    wanted = low_precision(config, device)
    # Without the cache: weights cast under no_grad for a target would be found again, and
    # cost the network its gradient, when it makes its own targets (pytorch issue 105211).
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)


def low_precision(config: TrainConfig, device: torch.device) -> bool:
    """Whether matrices are multiplied in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


def summarise(
    history: list[dict[str, Tensor]], step: int, config: TrainConfig
) -> dict[str, float]:
    """Means over the steps since the last line, in one transfer from the device.

    Raises:
        Diverged: a loss or gradient was not finite; nothing has been saved since.
    """
    names = list(history[0])
    table = torch.stack([torch.stack([m[k].float() for k in names]) for m in history]).cpu()
    always = torch.stack([table[:, names.index(k)] for k in ("loss", "grad_norm")], 1)
    bad = (~always.isfinite()).any(1).nonzero()
    if len(bad):
        first = int(bad[0])
        row = dict(zip(names, table[first].tolist(), strict=True))
        levels = [k for k, v in row.items() if k.startswith("loss/") and math.isinf(v)]
        found = checkpoint.checkpoints(config.out)
        kept = f"the last good checkpoint is {found[-1]}" if found else "nothing was saved yet"
        raise Diverged(
            f"the loss is not finite at step {step - len(history) + first + 1} "
            f"(loss {row['loss']:g}, {', '.join(levels) or 'gradient'}; gradient norm "
            f"{row['grad_norm']:g}): {kept}; lower --optimizer.lr or look at the data"
        )
    means = dict(zip(names, table.nanmean(0).tolist(), strict=True))
    means = {k: v for k, v in means.items() if not math.isnan(v)}
    first, length = config.phase(step - 1)
    return means | {"lr": config.optimizer.rate(step - 1 - first, length)}


def short(metrics: Mapping[str, float]) -> str:
    """The losses, as they stand at the end of the progress bar."""
    parts = {k.removeprefix("loss/"): v for k, v in metrics.items() if k.startswith("loss")}
    return " ".join(f"{k} {v:.3g}" for k, v in parts.items())


def progress_bar(config: TrainConfig, done: int, shown: bool) -> Any:
    """A bar with rate and time left."""
    return tqdm(
        total=config.steps,
        initial=done,
        unit="step",
        desc=config.out.name,
        disable=not shown,
        mininterval=1.0,
        dynamic_ncols=True,
    )


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that the step in hand is finished and saved.

    A second signal has its usual effect.
    """
    received: list[int] = []
    usual: dict[int, Any] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, usual[number])

    with contextlib.suppress(ValueError):  # signals belong to the main thread alone
        for wanted in (signal.SIGINT, signal.SIGTERM):
            usual[wanted] = signal.signal(wanted, receive)
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
