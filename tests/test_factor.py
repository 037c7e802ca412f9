"""tools/factor.py: how many times more numbers SFT needs than RL."""
import json
import math

import pytest

from helpers import one_error

from tools import factor

CURVE = [(1, 0.2), (10, 0.1), (100, 0.6), (1000, 0.9)]


@pytest.mark.parametrize("score, sign, numbers", [
    (0.1, "<", 1), (0.2, "<", 1), (0.6, "", 100), (0.95, ">", 1000),
    (0.4, "", 10**1.5),  # halfway from 10 to 100 on the logarithm's scale: 0.2 is reached at 1
    (0.75, "", 10**2.5)])
def test_numbers_needed(score, sign, numbers):
    """A dip is no step back: with 10 numbers at least the score of 1 can be had."""
    found = factor.numbers_needed(CURVE[::-1], score)
    assert found == (sign, pytest.approx(numbers))


@pytest.mark.parametrize("score, low, high", [
    (0.1, 0, 1), (0.2, 0, 1), (0.4, 10, 100), (0.6, 10, 100), (0.75, 100, 1000),
    (0.95, 1000, math.inf)])
def test_neighbours_are_measured_numbers(score, low, high):
    assert factor.neighbours(CURVE[::-1], score) == (low, high)


def sweep(path, settings, seeds=(0, 1, 2)):
    """A NAME.runs.json of {name: (params, [score of each seed])}."""
    document = {"seeds": list(seeds), "settings": [], "runs": {}}
    for name, (params, scores) in settings.items():
        keys = [f"{name} {seed}" for seed in seeds]
        document["settings"].append({"name": name, "series": name.split(",")[0], "runs": keys})
        for key, seed, score in zip(keys, seeds, scores):
            final = {"greedy": {"strict": score}, "T = 1": {"strict": score / 2}}
            document["runs"][key] = {"params": params, "seed": seed, "score": "strict",
                                     "final": final}
    path.write_text(json.dumps(document))
    return str(path)


def test_factors_are_taken_seed_by_seed(tmp_path, capsys):
    """Each seed's RL against the same seed's SFT; other kinds and other methods stay out."""
    rl = sweep(tmp_path / "rl", {"TinyLoRA, 10": (10, [0.4, 0.6, 0.95]), "LoRA": (50, [1, 1, 1])})
    settings = {f"{n}, own": (n, [score] * 3) for n, score in CURVE}
    sft = sweep(tmp_path / "sft", settings | {"1, worked": (1, [1, 1, 1])})
    assert factor.main([rl, sft, "own", "worked"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    own = "10 (3.2 to > 100)"
    rest = f"{own} | {own} | < 0.1 (< 0.1 to < 0.1) | < 0.1 (< 0.1 to < 0.1) |"
    assert row == f"| TinyLoRA, 10 | 10 | {rest}"


def test_sweeps_that_do_not_fit_are_refused(tmp_path, capsys):
    rl = sweep(tmp_path / "rl", {"TinyLoRA": (1, [0.5, 0.5, 0.5])})
    other = sweep(tmp_path / "sft", {"x, own": (1, [0.5, 0.5])}, seeds=(0, 1))
    assert factor.main([rl, other, "own"]) == 2
    one_error(capsys, "other seeds: [0, 1, 2] and [0, 1]")
    assert factor.main([rl, rl, "own"]) == 2
    one_error(capsys, "no setting's name ends with ', own'")
    (tmp_path / "sft").write_text('{"settings": []}')
    assert factor.main([rl, str(tmp_path / "sft"), "own"]) == 2
    one_error(capsys, "not finished")
