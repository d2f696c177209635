"""Every method on one yardstick: the same network, data, optimizer and compute.

A *budget* is a number of forward-equivalents (`anystep.compute`). Every run gets the number of
training steps that its budget pays for, by what one of its steps was counted to cost. A method
with a teacher is run twice: "inside", where teacher, pairs and student share the budget, and
"free", where the teacher is the flow matching run of the same seed and only pairs and student
are paid for. Learning rates, and the split of the budget "inside", are chosen by one sweep, at a
quarter of the budget and for seed 0, by the same rule for all methods (`Comparison.choose`).

What is finished is found in `scores/` and not done again, so an interrupted comparison goes on,
and several processes may share the work by taking different seeds.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anystep import checkpoint
from anystep.config import TrainConfig, config_json, pick_device
from anystep.data import Splits, seeded
from anystep.data.pairs import Pairs
from anystep.errors import UserError
from anystep.evaluate import Judge, evaluate, semigroup_gap
from anystep.interpolation import largest_jump, mix, strip
from anystep.log import read_metrics
from anystep.objectives import Batch
from anystep.pairs import make_pairs
from anystep.presets import objective
from anystep.provenance import provenance
from anystep.registry import differences
from anystep.report import save_grid
from anystep.spec import Model
from anystep.state import initial_state
from anystep.train import train

METHODS = (
    "diffusion",
    "flow_matching",
    "reflow",
    "live_reflow",
    "consistency_training",
    "consistency_distillation",
    "progressive_distillation",
    "shortcut",
)
TEACHER = "flow_matching"  # the method that trains teachers
SWEEP_SHARE, SWEEP_STEPS, SWEEP_SAMPLES = 0.25, (1, 4, 32), 1024
STRIPS, FRAMES = 24, 9  # interpolations judged: how many, and pictures in each


class Split(NamedTuple):
    """How a two-phase method divides its budget.

    Attributes:
        teacher: share that trains the teacher.
        pairs: share that makes pairs, for a method that needs them.
        pair_steps: sampling steps of a pair.
    """

    teacher: float = 0.0
    pairs: float = 0.0
    pair_steps: int = 0


SPLITS = (Split(1 / 2), Split(1 / 3), Split(2 / 3))
PAIR_SPLITS = (Split(1 / 2, 1 / 4, 16), Split(1 / 3, 1 / 3, 16), Split(1 / 2, 1 / 4, 32))


Judged = Callable[[Path, Model], dict[str, Any]]


class Choice(NamedTuple):
    """What the sweep chose for a method: a learning rate, and a split if it has a teacher."""

    rate: float
    split: Split


@dataclass(frozen=True)
class CompareConfig:
    """What is compared.

    Attributes:
        methods: names, or variants such as shortcut/paper.
        seeds: the seeds of the runs.
        budget: forward-equivalents of a run; 0 is what the preset itself spends, on shortcut.
        steps: sampling steps at which models are judged.
        n: samples judged at each.
        rates: learning rates of the sweep, as factors of the preset's.
        sizes: widths, as factors of the preset's, at which shortcut is trained besides, for as
            many steps, to see what model size does; () is none.
        out: folder of the report, with `scores/` (what is finished) and `runs/` (the models).
        device: auto, cpu or cuda.
    """

    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: int = 0
    steps: tuple[int, ...] = (1, 2, 4, 8, 32, 128)
    n: int = 2048
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    sizes: tuple[float, ...] = ()
    out: Path = Path("runs/compare")
    device: str = "auto"

    def __post_init__(self) -> None:
        for method in self.methods:
            objective(method)
        if not self.methods or not self.seeds or not self.rates:
            raise UserError("name at least one method, one seed and one rate")
        if len(self.steps) < 1 or min(self.steps) < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if self.budget < 0 or self.n < 10 or min((*self.rates, *self.sizes, 1.0)) <= 0:
            raise UserError("budget must be at least 0, n at least 10, rates and sizes positive")


class Entry(NamedTuple):
    """One run of the comparison.

    Attributes:
        method: its name.
        seed: its seed.
        variant: "" for a method in one phase, else "inside" or "free"; or "size 0.5".
    """

    method: str
    seed: int
    variant: str = ""

    @property
    def label(self) -> str:
        """How a report calls it, without its seed."""
        return self.method + (f" ({self.variant})" if self.variant else "")

    @property
    def key(self) -> str:
        """How its files are called."""
        return "-".join(f"{self.label} seed{self.seed}".translate(FILE_NAME).split())


FILE_NAME = str.maketrans({"(": " ", ")": " ", "/": " ", "_": "-"})


class Comparison:
    """The runs of a comparison: train what is missing, judge it, keep the scores.

    Args:
        base: a preset's config with any objective; its network, data, batch and optimizer are
            everybody's.
        config: what is compared.
    """

    def __init__(self, base: TrainConfig, config: CompareConfig) -> None:
        self.base, self.config = base, config
        self.budget = config.budget or round(base.steps * forwards_per_step(base))
        self.failures: dict[str, str] = {}

    @cached_property
    def splits(self) -> Splits:
        """The data."""
        return self.base.data.load()

    @cached_property
    def judge(self) -> Judge:
        """The yardstick."""
        return Judge(self.splits, device=pick_device(self.config.device))

    @property
    def metric(self) -> str:
        """The score by which methods are ranked."""
        return "frechet" if len(self.splits.train.shape) == 3 else "sliced"

    def entries(self) -> Iterator[Entry]:
        """All runs, seed by seed, teachers first."""
        methods = sorted(self.config.methods, key=lambda m: m != TEACHER)
        for seed, method in itertools.product(self.config.seeds, methods):
            required = objective(method).TEACHER != "none"
            for variant in ("inside", "free") if required else ("",):
                yield Entry(method, seed, variant)
        if "shortcut" in methods:
            for seed, size in itertools.product(self.config.seeds, self.config.sizes):
                yield Entry("shortcut", seed, f"size {size:g}")

    def run(self) -> dict[Entry, dict[str, Any]]:
        """Train and judge all that is missing; what fails is noted and the rest goes on.

        Returns:
            The scores of each run that is finished.
        """
        scores = {}
        for entry in self.entries():
            try:
                scores[entry] = self.scores(entry)
            except (UserError, RuntimeError, OSError) as error:
                self.failures[entry.key] = " ".join(str(error).split())
                print(f"{entry.key} failed: {self.failures[entry.key]}")
        return scores

    def scores(self, entry: Entry) -> dict[str, Any]:
        """The scores of a run, which is trained and judged if need be."""
        choice = self.choose(entry.method)
        return self.finished(entry.key, self.budget, choice, entry, self.judged)

    def choose(self, method: str) -> Choice:
        """The best choice for a method: that with the least distance of all that are tried."""
        return min(self.tried(method), key=lambda pair: pair[1])[0]

    def tried(self, method: str) -> list[tuple[Choice, float]]:
        """Each choice of the sweep with its distance (`swept`).

        First the rates, at the first split, then the other splits, at the best rate.
        """
        own = objective(method)
        splits = PAIR_SPLITS if own.PAIRS else SPLITS if own.TEACHER != "none" else (Split(),)
        rates = [self.base.optimizer.lr * factor for factor in self.config.rates]
        firsts = [Choice(rate, splits[0]) for rate in rates]
        if len(rates) == len(splits) == 1:
            return [(firsts[0], math.nan)]  # nothing to choose from
        tried = [(choice, self.swept(method, choice)) for choice in firsts]
        rate = min(tried, key=lambda pair: pair[1])[0].rate
        others = [Choice(rate, split) for split in splits[1:]]
        return tried + [(choice, self.swept(method, choice)) for choice in others]

    def swept(self, method: str, choice: Choice) -> float:
        """The distance of a run of the sweep; infinite if it failed.

        It is the geometric mean of the metric over those of `SWEEP_STEPS` for which the method
        claims good samples.
        """
        variant = "inside" if choice.split.teacher else ""
        parts = [f"{choice.rate:g}", *(f"{part:.3g}" for part in choice.split if part)]
        key = f"sweep-{Entry(method, 0, variant).key}-{'-'.join(parts)}"
        budget = round(SWEEP_SHARE * self.budget)
        entry = Entry(method, 0, variant)
        try:
            return float(self.finished(key, budget, choice, entry, self.quick)["metric"])
        except UserError as error:
            if self.path(key).exists():
                raise
            self.failures[key] = str(error)
            return math.inf

    def finished(
        self, key: str, budget: int, choice: Choice, entry: Entry, judged: Judged
    ) -> dict[str, Any]:
        """The content of `scores/KEY.json`, made by training and judging if it is not there.

        Raises:
            UserError: it is there, but of another budget, network, data or choice.
        """
        path = self.path(key)
        base = config_json(self.base)
        made_by = {
            "budget": budget,
            "choice": {"rate": choice.rate, **choice.split._asdict()},
            "base": {name: base[name] for name in ("data", "network", "optimizer", "batch")},
        }
        if path.exists():
            found: dict[str, Any] = checkpoint.read_json(path)
            changed = differences(found["made_by"], made_by)
            if changed:
                raise UserError(f"{path} was made otherwise ({'; '.join(changed)}): remove it")
            return found
        result = {"made_by": made_by, **self.trained(key, budget, choice, entry, judged)}
        result["provenance"] = provenance()
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, result)
        found = checkpoint.read_json(path)
        return found

    def path(self, key: str) -> Path:
        """Where the scores of a run are kept."""
        return self.config.out / "scores" / f"{key}.json"

    def trained(
        self, key: str, budget: int, choice: Choice, entry: Entry, judged: Judged
    ) -> dict[str, Any]:
        """Train a run and judge it."""
        out = self.config.out / "runs" / key
        config = self.run_config(entry.method, entry.seed, choice.rate, out)
        ledger = {"teacher": 0, "pairs": 0}
        if entry.variant.startswith("size "):
            config = self.resized(config, float(entry.variant.split()[1]))
        elif entry.variant:
            teacher, ledger["teacher"] = self.teacher(entry, budget, choice.split)
            config = replace(config, teacher=teacher)
        if config.objective.PAIRS and config.teacher is not None:
            share, steps = round(budget * choice.split.pairs), choice.split.pair_steps
            folder = out / "pairs"
            n = max(share // steps, 1)
            ledger["pairs"] = make_pairs(
                config.teacher, folder, n=n, steps=steps, seed=entry.seed, device=self.device
            )
            config = replace(config, data=Pairs(folder))
        paid = ledger["pairs"] + (ledger["teacher"] if entry.variant == "inside" else 0)
        config = self.timed(config, budget - paid)
        seconds = self.train(config)
        training = checkpoint.read_info(checkpoint.find_model(out))["training"]
        model = checkpoint.load_model(out, self.device)
        return {
            "method": entry.method,
            "variant": entry.variant,
            "seed": entry.seed,
            "steps": config.steps,
            "seconds": seconds,
            "parameters": sum(p.numel() for p in model.parameters()),
            "forwards": ledger | {"training": training["forwards"]},
            "claims": [n for n in self.config.steps if model.spec.in_regime(n)],
            **judged(out, model),
        }

    @property
    def device(self) -> torch.device:
        """Where models run."""
        return pick_device(self.config.device)

    def run_config(self, method: str, seed: int, rate: float, out: Path) -> TrainConfig:
        """The base config for a method, without a number of steps yet."""
        return replace(
            self.base,
            objective=objective(method),
            optimizer=replace(self.base.optimizer, lr=rate),
            seed=seed,
            out=out,
            device=self.config.device,
        )

    def resized(self, config: TrainConfig, factor: float) -> TrainConfig:
        """The config with a network of another width."""
        width: int = config.network.width  # type: ignore[attr-defined]
        network = replace(config.network, width=round(width * factor))  # type: ignore[call-arg]
        return replace(config, network=network)

    def timed(self, config: TrainConfig, budget: int) -> TrainConfig:
        """The config with the steps that a budget pays for, and looks along the way."""
        steps = int(budget / forwards_per_step(config))
        if steps < config.objective.phases:
            raise UserError(f"{config.out.name}: a budget of {budget} pays for {steps} steps")
        log = replace(
            self.base.log,
            look_every=-(-steps // 6),
            look_steps=(1, 4),
            look_samples=512,
            tensorboard=False,
        )
        return replace(config, steps=steps, log=log)

    def teacher(self, entry: Entry, budget: int, split: Split) -> tuple[Path, int]:
        """A trained teacher, and the forwards it took."""
        rate = self.choose(TEACHER).rate
        if entry.variant == "free":
            key = Entry(TEACHER, entry.seed).key
        else:
            budget = round(budget * split.teacher)
            key = f"teacher-{budget}-seed{entry.seed}"
        out = self.config.out / "runs" / key
        self.train(self.timed(self.run_config(TEACHER, entry.seed, rate, out), budget))
        return out, checkpoint.read_info(checkpoint.find_model(out))["training"]["forwards"]

    def train(self, config: TrainConfig) -> float:
        """Train; returns seconds, of this call alone."""
        clock = time.perf_counter()
        if not train(config):
            raise KeyboardInterrupt
        return time.perf_counter() - clock

    def quick(self, run: Path, model: Model) -> dict[str, Any]:
        """The one number that the sweep looks at."""
        claimed = [n for n in SWEEP_STEPS if model.spec.in_regime(n)] or [SWEEP_STEPS[-1]]
        rows = evaluate(run.name, model, self.judge, steps=claimed, n=SWEEP_SAMPLES, seed=1)
        values = [row.scores[self.metric] for row in rows if row.guidance == 1]
        return {"metric": statistics.geometric_mean(values)}

    def judged(self, run: Path, model: Model) -> dict[str, Any]:
        """Everything a report says of a model; its grid is drawn."""
        steps = self.config.steps
        rows = evaluate(run.name, model, self.judge, steps=steps, n=self.config.n, seed=1)
        save_grid(self.config.out / "grids" / f"{run.name}.png", model, steps)
        return {
            "scores": {str(row.steps): row.scores for row in rows if row.guidance == 1},
            "gap": semigroup_gap(model),
            "interpolation": self.interpolated(model),
            "curve": learning_curve(run),
        }

    def interpolated(self, model: Model) -> dict[str, float]:
        """Smoothness and quality of strips between two noises, at 1 step and at the most."""
        most = max(self.config.steps)
        result: dict[str, float] = {}
        inner: dict[str, list[torch.Tensor]] = {"arc": [], "pixels": []}
        jumps: dict[str, list[float]] = {"1": [], str(most): [], "pixels": []}
        for seed in range(STRIPS):
            for steps in (1, most):
                frames, _ = strip(model, FRAMES, steps=steps, seed=seed)
                jumps[str(steps)].append(largest_jump(frames))
                if steps == 1:
                    pixels = mix(frames[0], frames[-1], FRAMES)
                    jumps["pixels"].append(largest_jump(pixels))
                    inner["arc"].append(frames[1:-1])
                    inner["pixels"].append(pixels[1:-1])
        for name, values in jumps.items():
            result[f"jump/{name}"] = statistics.mean(values)
        for name, parts in inner.items():
            result[f"frechet/{name}"] = self.judge.frechet(torch.cat(parts))
        return result


def forwards_per_step(config: TrainConfig) -> float:
    """Forward-equivalents of a training step, counted over steps from all of the run."""
    splits = config.data.load()
    state = initial_state(config, splits, torch.device("cpu"))
    rows = slice(0, config.batch)
    x1, cond = splits.train.batch(rows)
    repeats = -(-config.batch // len(x1))
    index = torch.arange(len(x1)).repeat(repeats)[: config.batch]
    x0 = splits.train.noise(index)
    batch = Batch(x1[index], None if cond is None else cond[index], x0)
    moments = 2 * config.objective.phases
    for k in range(moments):
        config.objective(state.models, batch, (k + 0.5) / moments, seeded(0, k))
    return state.counter.rows / moments


def learning_curve(run: Path) -> list[dict[str, float]]:
    """The looks taken while a run went on: forwards, and Fréchet distances at each step count."""
    curve, forwards = [], 0.0
    for line in read_metrics(run / "metrics.jsonl"):
        forwards = line.get("forwards", forwards)
        looks = {k: v for k, v in line.items() if k.startswith("frechet/")}
        if looks:
            curve.append({"forwards": forwards, **looks})
    return curve
