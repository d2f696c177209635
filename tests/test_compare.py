import json
from dataclasses import replace

import pytest
from filelock import Timeout

from anystep import checkpoint, report
from anystep.cli import main
from anystep.compare import CompareConfig, Comparison, Entry, write_report
from anystep.compare import comparison as running
from anystep.compare.budget import forwards_per_step, with_steps
from anystep.compare.report import table
from anystep.config import LogConfig, OptimizerConfig, TrainConfig, config_json
from anystep.data.mixture import Mixture
from anystep.errors import UserError
from anystep.networks.mlp import MLPConfig
from anystep.objectives.flow_matching import FlowMatching
from anystep.objectives.shortcut import Shortcut
from anystep.train import Diverged

BUDGET = 40_000
METHODS = ("shortcut", "flow_matching", "reflow", "progressive_distillation")


def base():
    return TrainConfig(
        data=Mixture(train=600, held_out=100),
        network=MLPConfig(width=16, depth=1),
        objective=Shortcut(),
        optimizer=OptimizerConfig(lr=1e-2, warmup=3, decay="cosine"),
        log=LogConfig(trackers=()),
        batch=64,
        device="cpu",
    )


def comparison(out, **changes):
    config = CompareConfig(
        methods=METHODS, seeds=(0, 1), budget=BUDGET, steps=(1, 4, 8), n=100, rates=(0.5, 1.0),
        sizes=(0.5,), out=out, device="cpu",
    )  # fmt: skip
    return Comparison(base(), replace(config, **changes))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A small comparison, run to its end."""
    out = tmp_path_factory.mktemp("compare")
    made = comparison(out)
    with pytest.MonkeyPatch.context() as patch:  # pictures taken on the way take longer than runs
        patch.setattr(report, "save_grid", lambda *_, **__: None)
        results = made.run()
    assert not made.failures
    return made, results, write_report(made, results)


def test_every_method_runs_and_two_phase_methods_run_twice(done):
    _, results, _ = done
    labels = {entry.label for entry in results}
    assert labels == {
        "flow_matching",
        "progressive_distillation (free)",
        "progressive_distillation (inside)",
        "reflow (free)",
        "reflow (inside)",
        "shortcut",
        "shortcut (size 0.5)",
    }
    assert all(sum(e.label == label for e in results) == 2 for label in labels)


def test_all_spend_the_same_compute(done):
    _, results, _ = done
    for entry, result in results.items():
        forwards = result["forwards"]
        free = entry.variant == "free"
        spent = sum(forwards.values()) - (forwards["teacher"] if free else 0)
        # Less than the budget by what one more step, and one more pair, would cost.
        assert 0 <= BUDGET - spent <= 64 * 5 + 32, entry
        if free:
            assert 0 <= BUDGET - forwards["teacher"] <= 64 * 3
        assert (forwards["pairs"] > 0) == (entry.method == "reflow")


def test_only_what_a_method_claims_is_outside_parentheses(done):
    _, results, _ = done
    scores = {}
    for entry, result in results.items():
        scores.setdefault(entry.label, []).append(result)
    rows = {
        row.split("|")[1].strip(): row.split("|")[2:-1]
        for row in table(scores, "sliced", (1, 4, 8))
    }
    shown = {label: [not cell.strip().startswith("(") for cell in r] for label, r in rows.items()}
    assert shown["flow_matching"] == [False, False, False]
    assert shown["progressive_distillation (free)"] == [True, False, False]
    assert shown["shortcut"] == [True, True, True]
    values = [r["scores"]["4"]["sliced"] for r in scores["shortcut"]]
    assert f"{sum(values) / 2:.3g} ± " in rows["shortcut"][1]


def test_the_report_has_all_its_parts(done):
    made, results, files = done
    text = files["report"].read_text()
    for part in ("## The paper's statements", "## The sweep", "## Compute", "* commit:"):
        assert part in text
    assert text.count("**undecided**") + text.count("**held**") + text.count("**not held**") == 8
    assert text.count(f"| {made.base.optimizer.lr:g} |") >= len(METHODS)
    for name in ("steps.png", "compute.png"):
        assert (made.config.out / name).stat().st_size > 1000
    for entry in results:
        if entry.seed == 0:
            assert (made.config.out / "grids" / f"{entry.key}.png").is_file()
            assert f"grids/{entry.key}.png" in text


def test_the_sweep_chooses_what_scored_best(done):
    made, _, _ = done
    for method in METHODS:
        tried = made.tried(method)
        assert made.choose(method) == min(tried, key=lambda pair: pair[1])[0]
        assert len({choice for choice, _ in tried}) == len(tried)
    assert len(made.tried("shortcut")) == 2 and len(made.tried("reflow")) == 2 + 2
    quarter = json.loads(next((made.config.out / "scores").glob("sweep-shortcut*")).read_text())
    assert quarter["made_by"]["rest"]["budget"] == BUDGET / 4


def test_without_a_choice_nothing_is_swept(tmp_path):
    made = comparison(tmp_path, rates=(2.0,))
    assert made.choose("shortcut").rate == 2 * base().optimizer.lr
    assert not (tmp_path / "scores").exists()


def test_the_teacher_of_a_base_and_dashes_in_names_do_not_matter(tmp_path):
    made = Comparison(
        replace(base(), teacher=tmp_path),
        CompareConfig(methods=("flow-matching", "flow_matching"), budget=BUDGET, out=tmp_path),
    )
    assert made.base.teacher is None and made.config.methods == ("flow_matching",)


def test_what_is_finished_is_not_done_again(done, monkeypatch):
    made, results, _ = done

    def not_again(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(running, "train", not_again)
    assert comparison(made.config.out).run() == results


def test_a_missing_run_alone_is_done_again(done, monkeypatch):
    made, results, _ = done
    entry = Entry("shortcut", 1)
    seconds = results[entry]["seconds"]
    (made.config.out / "scores" / f"{entry.key}.json").unlink()
    trained = []
    usual = running.train
    monkeypatch.setattr(running, "train", lambda c: trained.append(c.out.name) or usual(c))
    again = comparison(made.config.out).run()
    assert trained == [entry.key]
    assert again[entry]["scores"] == results[entry]["scores"]
    assert again[entry]["seconds"] == seconds > 0  # those of the training, not of this call


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budget": BUDGET + 1000}, "budget"),
        ({"n": 200}, "n: 100 -> 200"),
        ({"steps": (1,)}, "st"),
    ],
)
def test_scores_made_otherwise_are_refused(done, changes, named):
    made, _, _ = done
    other = comparison(made.config.out, **changes)
    assert other.run() == {} and all(named in why for why in other.failures.values())


def test_another_base_is_refused(done):
    made, _, _ = done
    other = Comparison(replace(base(), ema=0.5), made.config)
    assert other.run() == {} and "ema: 0.999 -> 0.5" in next(iter(other.failures.values()))


def test_a_report_of_nothing_says_so(tmp_path):
    made = comparison(tmp_path)
    made.failures["shortcut-seed0"] = "no luck"
    text = write_report(made, {})["report"].read_text()
    assert text.count("**undecided**") == 8 and "* shortcut-seed0: no luck" in text


def test_a_rate_that_diverges_is_not_chosen(tmp_path, monkeypatch):
    usual, tried = running.train, []

    def diverging(config):
        tried.append(config.optimizer.lr)
        if config.optimizer.lr != 5e-3:
            raise Diverged("the loss is not finite")
        return usual(config)

    monkeypatch.setattr(running, "train", diverging)
    made = comparison(tmp_path, rates=(0.5, 1.0))
    assert made.choose("flow_matching").rate == 5e-3
    assert comparison(tmp_path, rates=(0.5, 1.0)).choose("flow_matching").rate == 5e-3
    assert tried == [5e-3, 1e-2]  # nothing is tried twice, not even what diverged
    with pytest.raises(UserError, match="diverged at every rate"):
        comparison(tmp_path, rates=(1.0, 2.0)).choose("flow_matching")


def test_a_run_is_left_to_the_process_that_has_it(done, tmp_path):
    made, _, _ = done
    assert made.lock("x").lock_file == comparison(made.config.out).lock("x").lock_file
    assert made.lock("x-0.5").lock_file != made.lock("x-0.25").lock_file
    with made.lock("x"), pytest.raises(Timeout):
        comparison(made.config.out).lock("x").acquire(timeout=0.01)


def test_one_failing_run_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    usual = running.train

    def failing(config):
        if config.out.name == "shortcut-seed0":
            raise Diverged("the loss is not finite")
        return usual(config)

    monkeypatch.setattr(running, "train", failing)
    made = comparison(
        tmp_path, methods=("shortcut", "flow_matching"), seeds=(0,), sizes=(), rates=(1.0,)
    )
    results = made.run()
    assert [entry.method for entry in results] == ["flow_matching"]
    assert made.failures == {"shortcut-seed0": "the loss is not finite"}
    files = write_report(made, results)
    assert "* shortcut-seed0: the loss is not finite" in files["report"].read_text()


def test_cost_is_counted_over_all_phases(tmp_path):
    config = replace(base(), objective=FlowMatching(), out=tmp_path)
    assert forwards_per_step(config) == 3 * 64
    share = Shortcut().bootstrap_rows(64)
    assert forwards_per_step(replace(config, objective=Shortcut())) == 3 * 64 + 2 * share


def test_the_last_look_is_at_the_end_of_a_run(tmp_path):
    config = replace(base(), objective=FlowMatching(), out=tmp_path)
    made = with_steps(config, 1442 * 3 * 64, looks=6)
    assert made.steps == 1442
    looks = [n for n in range(1, made.steps + 1) if n % made.log.look_every == 0]
    assert len(looks) == 6 and made.steps - looks[-1] < 6


class TestCommandLine:
    def test_from_a_config_to_a_report(self, tmp_path, capsys):
        config = tmp_path / "base.json"
        checkpoint.write_json(config, config_json(base()))
        words = ["--methods", "flow_matching", "--seeds", "0", "--budget", "20000", "--steps", "1"]
        out = str(tmp_path / "out")
        assert main(["compare", str(config), *words, "--n", "50", "--out", out]) == 0
        assert "| flow_matching | (" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["digit"], "did you mean 'digits'"),
            (["--methods", "shortcut"], "name a preset first"),
            (["mixture", "--methods", "shortcuts"], "did you mean 'shortcut'"),
            (["mixture", "--steps", "0"], "steps must be at least 1"),
            (["mixture", "--budgets", "3"], "did you mean '--budget'"),
            (["mixture", "--n", "1"], "n at least 10"),
            (["mixture", "--seeds", "-1"], "seeds at least 0"),
            (["mixture", "--sizes", "1"], "sizes are other than 1"),
            (["folder"], "needs a path"),
            (["vectors"], "needs a path"),
        ],
    )
    def test_mistakes_get_one_line(self, words, message, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["compare", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
