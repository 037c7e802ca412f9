"""tools/needed.py: how many trained numbers a model of a size needs."""
import json

import pytest

from helpers import one_error

from tools import needed


def sweep(path, curves):
    """A NAME.runs.json of {size: [(numbers, [score of each seed]), ...]}, untrained 0.2."""
    document = {"settings": [], "runs": {}}
    for size, points in curves.items():
        for numbers, scores in points:
            keys = [f"{size} {numbers} {seed}" for seed in range(len(scores))]
            name = f"{size}, {'peak' if numbers > 1000 else numbers}"
            document["settings"].append({"name": name, "series": size, "runs": keys})
            for key, score in zip(keys, scores):
                document["runs"][key] = {
                    "params": numbers, "score": "strict",
                    "base": {"greedy": {"strict": 0.2}, "T = 1": {"strict": 0.1}},
                    "final": {"greedy": {"strict": score}, "T = 1": {"strict": 0.5}}}
    path.write_text(json.dumps(document))
    return str(path)


def test_numbers_by_size(tmp_path, capsys):
    """Peak 1.0 over 0.2: 90% is 0.92. The mean curve of the small one is 0.2, 0.84, 1.0."""
    path = sweep(tmp_path / "x", {
        "small": [(1, [0.2, 0.2]), (10, [0.68, 1.0]), (1000, [1.0, 1.0])],
        "large": [(1, [0.96, 0.98]), (10, [1.0, 1.0])]})
    assert needed.main([path]) == 0
    rows = capsys.readouterr().out.splitlines()
    middle = 10 * 100 ** ((0.92 - 0.84) / 0.16)  # 100
    slow = 10 * 100 ** ((0.92 - 0.68) / 0.32)  # 316
    fast = 10 ** ((0.92 - 0.2) / 0.8)  # 7.9
    assert rows[2].startswith(
        f"| greedy | small | 0.200 | 1.000 | {middle:.0f} ({fast:.1f} to {slow:.0f}) |")
    assert rows[3] == "| greedy | large | 0.200 | 1.000 | < 1.0 (< 1.0 to < 1.0) | < 1.0 | 2.2 |"
    assert rows[4].startswith("| T = 1 | small | 0.100 | 0.500 | < 1.0 (")


def test_a_peak_is_no_point_of_the_curve_and_a_small_one_has_no_shares(tmp_path, capsys):
    """LoRA's numbers do not count: with other ones the table is the same."""
    said = []
    for peak in (2000, 9000):
        path = sweep(tmp_path / "x", {
            "small": [(1, [0.2, 0.2]), (10, [0.28, 0.28]), (peak, [0.29, 0.29])],
            "large": [(1, [0.2, 0.2]), (10, [0.6, 0.6]), (peak, [1.0, 1.0])]})
        assert needed.main([path]) == 0
        said.append(capsys.readouterr().out.splitlines())
    assert said[0] == said[1]
    assert said[0][2] == "| greedy | small | 0.200 | 0.290 |  |  |  |"
    assert said[0][3] == (
        "| greedy | large | 0.200 | 1.000 | > 10 (> 10 to > 10) | > 10 | > 10 |")


def test_a_seed_that_never_gets_there():
    (_, numbers), seeds = needed.needed(0.2, 0.75, [(1, [0.2, 0.2]), (10, [0.5, 1.0])], 0.9)
    assert numbers == pytest.approx(10 ** ((0.695 - 0.2) / 0.55))
    assert [sign for sign, _ in seeds] == ["", ">"]


def test_shares_of_one_series_gain(tmp_path, capsys):
    """LoRA's best has a gain of 0.6, so half is 0.5: between 10 and 100 numbers, though another
    setting ends higher. The settings' order in the file does not matter."""
    path = sweep(tmp_path / "x", {
        "LoRA": [(900, [0.7, 0.7]), (800, [0.8, 0.8])],
        "TinyLoRA": [(10, [0.3, 0.3]), (1, [0.4, 0.2])],
        "LoRA-XS": [(100, [0.9, 0.5])]})
    assert needed.main([path, "--of", "LoRA", "--share", "0.5", "0.9"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "| peak of LoRA | numbers for 50% | numbers for 90% |" in rows[0]
    middle = 10 * 10 ** (0.2 / 0.4)  # the means are 0.3, 0.3, 0.7
    first = 10 * 10 ** (0.1 / 0.5)  # from 0.4 with 1 number, not from the dip to 0.3
    assert rows[2].startswith(f"| greedy | all settings | 0.200 | 0.800 | {middle:.0f} ({first:.0f}"
                              f" to 100) | ")
    assert needed.main([path, "--of", "lora"]) == 2
    one_error(capsys, "no series 'lora'; there are LoRA, TinyLoRA, LoRA-XS")


def test_an_unfinished_sweep_is_refused(tmp_path, capsys):
    (tmp_path / "x").write_text('{"settings": []}')
    assert needed.main([str(tmp_path / "x")]) == 2
    one_error(capsys, "not finished")
