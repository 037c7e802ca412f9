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
            document["settings"].append({"name": f"{size}, {numbers}", "series": size,
                                         "runs": keys})
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


def test_a_seed_that_never_gets_there():
    (_, numbers), seeds = needed.needed(0.2, [(1, [0.2, 0.2]), (10, [0.5, 1.0])], 0.9)
    assert numbers == pytest.approx(10 ** ((0.695 - 0.2) / 0.55))
    assert [sign for sign, _ in seeds] == ["", ">"]


def test_an_unfinished_sweep_is_refused(tmp_path, capsys):
    (tmp_path / "x").write_text('{"settings": []}')
    assert needed.main([str(tmp_path / "x")]) == 2
    one_error(capsys, "not finished")
