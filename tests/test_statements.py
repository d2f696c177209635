import pytest

from anystep.compare.statements import (
    HELD,
    NOT_HELD,
    UNDECIDED,
    Claim,
    Statement,
    as_markdown,
    statements,
)


@pytest.mark.parametrize(
    ("larger", "smaller", "verdict"),
    [
        ([3.0, 3.1, 2.9], [1.0, 1.1, 0.9], HELD),
        ([1.0, 1.1, 0.9], [3.0, 3.1, 2.9], NOT_HELD),
        ([1.0, 1.1, 0.9], [1.05, 0.95, 1.0], UNDECIDED),
        # Means 0.2 apart; standard errors sqrt(2 * 0.01 / 3) = 0.0816: just over two of them.
        ([1.3, 1.2, 1.1], [1.1, 1.0, 0.9], HELD),
        ([1.26, 1.16, 1.06], [1.1, 1.0, 0.9], UNDECIDED),
        ([3.0], [1.0], UNDECIDED),  # one seed says nothing of its spread
        ([], [1.0, 1.0], UNDECIDED),
    ],
)
def test_a_claim_needs_two_standard_errors(larger, smaller, verdict):
    claim = Claim("a", "b", larger, smaller)
    assert claim.verdict() == verdict
    assert str(claim).endswith(verdict)


def test_a_statement_is_no_better_than_its_worst_claim():
    held, not_held = Claim("a", "b", [2, 2.1], [1, 1.1]), Claim("a", "b", [1, 1.1], [2, 2.1])
    undecided = Claim("a", "b", [1], [2])
    assert Statement("", [held, held]).verdict() == HELD
    assert Statement("", [held, undecided]).verdict() == UNDECIDED
    assert Statement("", [held, undecided, not_held]).verdict() == NOT_HELD
    assert Statement("", []).verdict() == UNDECIDED


def results(by_steps, **more):
    """Three seeds of a method with these distances, give or take a hundredth."""
    return [
        {"scores": {str(n): {"frechet": v + k / 100} for n, v in by_steps.items()}, **more}
        for k in (-1, 0, 1)
    ]


PAPER = {  # CelebA-HQ-256, table 1
    "diffusion": {128: 23.0, 4: 123.4, 1: 132.2},
    "flow_matching": {128: 7.3, 4: 63.3, 1: 280.5},
    "reflow (inside)": {128: 16.1, 4: 18.4, 1: 23.2},
    "live_reflow": {128: 6.3, 4: 27.2, 1: 43.3},
    "consistency_training": {128: 53.7, 4: 19.0, 1: 33.2},
    "progressive_distillation (free)": {128: 302.9, 4: 251.3, 1: 14.8},
    "shortcut (size 0.5)": {128: 9.0, 4: 20.0, 1: 30.0},
    "shortcut (size 2)": {128: 5.0, 4: 10.0, 1: 15.0},
}


def paper():
    inner = {"jump/128": 3.0, "jump/1": 2.0, "distance/pixels": 5.0, "distance/arc": 4.0}
    noisy = [{k: v + s / 100 for k, v in inner.items()} for s in (-1, 0, 1)]
    shortcut = results({128: 6.9, 4: 13.8, 1: 20.5})
    for result, strip in zip(shortcut, noisy, strict=True):
        result["interpolation"] = strip
    scores = {name: results(row) for name, row in PAPER.items()} | {"shortcut": shortcut}
    for label, found in scores.items():
        method, _, words = label.partition(" (")
        size = float(words[5:-1]) if words.startswith("size") else 1.0
        for result in found:
            result |= {"method": method, "size": size}
    return scores


def test_the_papers_own_numbers_hold_the_papers_statements():
    found = statements(paper(), "frechet", (1, 4, 128))
    assert [s.verdict() for s in found] == [HELD] * 8
    sizes = [(claim.larger, claim.smaller) for claim in found[6].claims]
    assert sizes == [
        ("shortcut (size 0.5) at 1", "shortcut at 1"),
        ("shortcut at 1", "shortcut (size 2) at 1"),
    ]
    text = "\n".join(as_markdown(found))
    assert text.count("**held**") == 8 and "flow_matching at 128 7.3 ± 0.01" in text


@pytest.mark.parametrize(
    ("number", "label", "row"),
    [
        (1, "live_reflow", {128: 6.3, 4: 12.0, 1: 43.3}),
        (2, "diffusion", {128: 23.0, 4: 40.0, 1: 132.2}),
        (3, "flow_matching", {128: 5.0, 4: 63.3, 1: 280.5}),
        (4, "progressive_distillation (free)", {128: 302.9, 4: 251.3, 1: 24.8}),
        (5, "consistency_training", {128: 10.0, 4: 19.0, 1: 33.2}),
        (6, "reflow (inside)", {128: 16.1, 4: 18.4, 1: 3.2}),
        (7, "shortcut (size 2)", {128: 5.0, 4: 10.0, 1: 25.0}),
    ],
)
def test_each_statement_can_fail(number, label, row):
    scores = paper()
    scores[label] = results(row, **{k: scores[label][0][k] for k in ("method", "size")})
    found = statements(scores, "frechet", (1, 4, 128))
    assert found[number - 1].verdict() == NOT_HELD


def test_rough_strips_fail_the_last_statement():
    scores = paper()
    for result in scores["shortcut"]:
        result["interpolation"]["jump/1"] = 9.0
    assert statements(scores, "frechet", (1, 4, 128))[7].verdict() == NOT_HELD


def test_a_step_count_that_was_not_judged_is_left_out():
    scores = paper()
    for results_of_one in scores.values():
        for result in results_of_one:
            del result["scores"]["1"]
    found = statements(scores, "frechet", (4, 128))
    assert [s.verdict() for s in found[:3]] == [HELD] * 3
    assert found[3].verdict() == found[6].verdict() == UNDECIDED
    assert "not run: 1 of its comparisons" in "\n".join(as_markdown(found))


def test_what_was_not_run_is_undecided():
    assert {s.verdict() for s in statements({}, "frechet", (1, 4, 128))} == {UNDECIDED}
