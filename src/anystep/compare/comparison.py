"""Train and judge the runs of a comparison, each at the same compute.

A *budget* is a number of forward-equivalents (`anystep.compute`). Every run gets the number of
training steps that its budget pays for, by what one of its steps was counted to cost. A method
with a teacher is run twice: "inside", where teacher, pairs and student share the budget, and
"free", where the teacher is the flow matching run of the same seed and only pairs and student
are paid for. Learning rates, and the split of the budget "inside" (which "free" takes its share
of pairs from), are chosen by one sweep, at a quarter of the budget and for seed 0, by the same
rule for all methods (`Comparison.tried`).

What is finished is found in `scores/` and not done again, so an interrupted comparison goes on.
Several processes may share the work by taking different seeds: a lock keeps each run to one of
them. A last call with all seeds writes the report.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from anystep import checkpoint
from anystep.compare.budget import forwards_per_step, with_steps
from anystep.compare.judging import judged, quick
from anystep.compare.plan import TEACHER, Choice, CompareConfig, Entry, splits
from anystep.config import TrainConfig, changes, config_json, pick_device
from anystep.data import Splits
from anystep.data.pairs import Pairs
from anystep.errors import UserError
from anystep.evaluate import Judge
from anystep.pairs import make_pairs
from anystep.presets import objective
from anystep.provenance import provenance
from anystep.registry import differences
from anystep.report import save_grid
from anystep.spec import Model
from anystep.train import Diverged, train

SWEEP_SHARE = 0.25  # of the budget
LOOKS = 6  # along a run


class Run(NamedTuple):
    """A run to be trained: what it is called, what it is, what it may spend, by which choice."""

    key: str
    entry: Entry
    budget: int
    choice: Choice


class Comparison:
    """The runs of a comparison: train what is missing, judge it, keep the scores.

    Args:
        base: a config with any objective; its network, data, batch and optimizer are everybody's.
        config: what is compared.

    Attributes:
        budget: forward-equivalents of a run.
        failures: what went wrong, by run.
        sweeps: what was tried for each method, with its distance.
    """

    def __init__(self, base: TrainConfig, config: CompareConfig) -> None:
        self.base, self.config = replace(base, teacher=None), config
        preset = replace(self.base, objective=objective("shortcut"))
        self.budget = config.budget or round(base.steps * forwards_per_step(preset))
        self.failures: dict[str, str] = {}
        self.sweeps: dict[str, list[tuple[Choice, float]]] = {}

    @cached_property
    def splits(self) -> Splits:
        """The data that samples are judged against."""
        return self.base.data.reference(self.base.data.load())

    @cached_property
    def judge(self) -> Judge:
        """The yardstick."""
        return Judge(self.splits, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where models run."""
        return pick_device(self.config.device)

    def run(self) -> dict[Entry, dict[str, Any]]:
        """Train and judge all that is missing; what fails is noted and the rest goes on.

        Returns:
            The scores of each run that is finished.
        """
        scores = {}
        for entry in self.config.entries():
            try:
                run = Run(entry.key, entry, self.budget, self.choose(entry.method))
                scores[entry] = self.finished(run, self.judged)
            except Exception as error:  # whatever it is, the other runs are not to be lost
                reason = " ".join(str(error).split())
                if not isinstance(error, UserError):
                    reason = f"{type(error).__name__}: {reason}"
                self.failures[entry.key] = reason
                print(f"{entry.key} failed: {reason}")
        return scores

    def choose(self, method: str) -> Choice:
        """The best choice for a method: that with the least distance of all that are tried.

        Raises:
            UserError: none of them could be trained.
        """
        if method not in self.sweeps:
            self.sweeps[method] = self.tried(method)
        choice, distance = min(self.sweeps[method], key=lambda pair: pair[1])
        if distance == math.inf:
            raise UserError(f"{method} diverged at every rate of the sweep; name lower --rates")
        return choice

    def tried(self, method: str) -> list[tuple[Choice, float]]:
        """Each choice of the sweep with its distance (`quick`); infinite if it diverged.

        First the rates, at the first split, then the other splits, at the best rate.
        """
        options = splits(objective(method))
        rates = [self.base.optimizer.lr * factor for factor in self.config.rates]
        if len(rates) == len(options) == 1:
            return [(Choice(rates[0], options[0]), math.nan)]  # nothing to choose from
        tried = [self.swept(method, Choice(rate, options[0])) for rate in rates]
        rate = min(tried, key=lambda pair: pair[1])[0].rate
        return tried + [self.swept(method, Choice(rate, split)) for split in options[1:]]

    def swept(self, method: str, choice: Choice) -> tuple[Choice, float]:
        """A choice of the sweep with its distance."""
        entry = Entry(method, 0, "inside" if choice.split.teacher else "")
        parts = [f"{choice.rate:g}", *(f"{part:.3g}" for part in choice.split if part)]
        key = f"sweep-{entry.key}-{'-'.join(parts)}"
        run = Run(key, entry, round(SWEEP_SHARE * self.budget), choice)
        found = self.finished(run, self.quick)["distance"]
        return choice, math.inf if found is None else float(found)

    def finished(
        self, run: Run, trained_and_judged: Callable[[Run], dict[str, Any]]
    ) -> dict[str, Any]:
        """The content of `scores/KEY.json`, made if it is not there.

        Raises:
            UserError: it is there, but was made otherwise; what differs is named.
        """
        path = self.config.out / "scores" / f"{run.key}.json"
        made_by = self.made_by(run)
        with self.lock(run.key):
            if not path.exists():
                result = {"made_by": made_by, **trained_and_judged(run), "made_at": provenance()}
                path.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.write_json(path, result)
        found: dict[str, Any] = checkpoint.read_json(path)  # also when just made: keys are text
        changed = changes(found["made_by"]["config"], made_by["config"])
        changed += differences(found["made_by"]["rest"], made_by["rest"])
        if changed:
            raise UserError(
                f"{path} was made otherwise ({'; '.join(changed)}): remove it and "
                f"{self.folder(run.key)}, or choose another --out"
            )
        return found

    def made_by(self, run: Run) -> dict[str, Any]:
        """All that decides the result of a run, as JSON data."""
        config = config_json(self.run_config(run))
        rest: dict[str, Any] = {"budget": run.budget, "split": run.choice.split._asdict()}
        rest |= {"n": self.config.n, "steps": list(self.config.steps)}
        if run.entry.variant:
            rest["teacher_rate"] = self.choose(TEACHER).rate
        return {"config": config, "rest": rest}

    def lock(self, key: str) -> FileLock:
        """A lock that keeps a run to one process."""
        folder = self.folder(key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(folder.with_name(f"{key}.lock"))  # a key may hold dots

    def folder(self, key: str) -> Path:
        """Where a run is trained."""
        return self.config.out / "runs" / key

    def judged(self, run: Run) -> dict[str, Any]:
        """Train a run and judge it for the report; its grid is drawn."""
        ledger, model = self.trained(run, LOOKS)
        steps, out = self.config.steps, self.folder(run.key)
        save_grid(self.config.out / "grids" / f"{run.key}.png", model, steps)
        return ledger | judged(out, model, self.judge, steps, self.config.n)

    def quick(self, run: Run) -> dict[str, Any]:
        """Train a run and judge it for the sweep: a distance, None if the training diverged."""
        try:
            ledger, model = self.trained(run, 0)
        except Diverged:
            return {"distance": None}
        return ledger | {"distance": quick(model, self.judge)}

    def trained(self, run: Run, looks: int) -> tuple[dict[str, Any], Model]:
        """Train a run; what it is and took, and its model."""
        out, entry, split = self.folder(run.key), run.entry, run.choice.split
        config = self.run_config(run)
        forwards = {"teacher": 0, "pairs": 0}
        if entry.variant:
            teacher, forwards["teacher"] = self.teacher(run)
            config = replace(config, teacher=teacher)
            if config.objective.PAIRS:
                n = max(round(run.budget * split.pairs) // split.pair_steps, 1)
                folder = out / "pairs"
                forwards["pairs"] = make_pairs(
                    teacher, folder, n=n, steps=split.pair_steps, seed=entry.seed,
                    device=self.device,
                )  # fmt: skip
                config = replace(config, data=Pairs(folder))
        paid = forwards["pairs"] + (forwards["teacher"] if entry.variant == "inside" else 0)
        config = with_steps(config, run.budget - paid, looks)
        training = self.train(config)
        model = checkpoint.load_model(out, self.device)
        ledger = {
            "method": entry.method,
            "variant": entry.variant,
            "size": entry.size,
            "seed": entry.seed,
            "steps": config.steps,
            "seconds": training["seconds"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "forwards": forwards | {"training": training["forwards"]},
        }
        return ledger, model

    def run_config(self, run: Run) -> TrainConfig:
        """The base config for a run, without teacher, pairs and number of steps yet."""
        entry, network = run.entry, self.base.network
        if entry.size != 1:
            width = getattr(network, "width", None)
            if width is None:
                raise UserError("sizes need a network with a width")
            network = replace(network, **{"width": round(width * entry.size)})
        return replace(
            self.base,
            objective=objective(entry.method),
            network=network,
            optimizer=replace(self.base.optimizer, lr=run.choice.rate),
            seed=entry.seed,
            out=self.folder(run.key),
            device=self.config.device,
        )

    def teacher(self, run: Run) -> tuple[Path, int]:
        """A trained teacher, and the forwards it took."""
        entry = Entry(TEACHER, run.entry.seed)
        budget, key, looks = run.budget, entry.key, LOOKS
        if run.entry.variant == "inside":
            budget, looks = round(run.budget * run.choice.split.teacher), 0
            key = f"teacher-{budget}-seed{entry.seed}"
        teacher = Run(key, entry, budget, self.choose(TEACHER))
        with self.lock(key):
            training = self.train(with_steps(self.run_config(teacher), budget, looks))
        return self.folder(key), training["forwards"]

    def train(self, config: TrainConfig) -> dict[str, Any]:
        """Train; returns what the model says of its training."""
        if not train(config):
            raise KeyboardInterrupt
        facts: dict[str, Any] = checkpoint.read_info(checkpoint.find_model(config.out))["training"]
        return facts
