"""tools/styles.py: the toy's three styles, told apart and counted."""
import json

import numpy as np
import pytest

from helpers import ROOT, TOY

from support.data import module_at
from tools import styles


def test_each_style_of_the_toys_own_writer_is_told():
    make = module_at(TOY / "make.py")
    rng = np.random.RandomState(0)
    for _ in range(200):
        _, steps, _ = make.problem(rng)
        for name, told in zip(("careful", "hasty", "guess"), styles.STYLES, strict=True):
            assert styles.style(make.solution(steps, name, rng)) == told
            assert styles.style(" " + make.solution(steps, name, rng)) == told
    assert styles.style("") == "in one go"


CAREFUL = "Let's go step by step. 1 + 1 = 2. So the answer is 2.\n#### 2"


def written(folder, evaluations):
    """A sweep of one setting, seeds 4, 5, ...: [(step, sampled, response, right), ...] each."""
    runs = {}
    for seed, rows in enumerate(evaluations, 4):
        runs[f"key{seed}"] = {"seed": seed}
        (folder / f"key{seed}").mkdir()
        lines = [{"step": step, "sampled": sampled, "response": response, "prompt": str(i),
                  "scores": {"strict": float(right), "lenient": 1.0}}
                 for i, (step, sampled, response, right) in enumerate(rows)]
        lines.insert(1, {"step": 9, "rollout": True, "response": CAREFUL})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"key{seed}" / "samples.jsonl").write_text(text)
    document = {"settings": [{"name": "a setting", "runs": list(runs)}], "runs": runs}
    (folder / "A.runs.json").write_text(json.dumps(document))
    return ["A.runs.json", "--runs", ".", "--out", "out.json"]


def test_counts_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = [(0, False, "Maybe 3.", 0), (0, False, CAREFUL, 1), (0, True, "1 + 1 = 3\n#### 3", 0)]
    better = [(20, False, CAREFUL, 1), (20, True, CAREFUL, 1), (20, True, CAREFUL, 0)]
    worse = [(20, False, "Maybe 2.", 1), (20, True, "Maybe 2.", 0), (20, True, CAREFUL, 0)]
    words = written(tmp_path, [base + better, base + worse])
    assert styles.main(words) == 0
    found = json.loads((tmp_path / "out.json").read_text())["a setting"]
    assert found["4"]["base"] == {
        "greedy": {"step by step": [1, 1], "in one go": [0, 0], "a guess": [1, 0]},
        "T = 1": {"step by step": [0, 0], "in one go": [1, 0], "a guess": [0, 0]}}
    assert found["4"]["final"]["T = 1"]["step by step"] == [2, 1]
    assert found["5"]["final"]["greedy"]["a guess"] == [1, 1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| untrained | 0.500 (1.00) | 0.000 | 0.500 (0.00) | 0.000 | 1.000 (0.00) " \
                       "| 0.000 |"
    assert [line.split(" | ")[:2] for line in lines[3:5]] == [
        ["| a setting, seed 5", "0.000"], ["| a setting, seed 4", "1.000 (1.00)"]]
    assert " ".join(lines[5:]) == (
        " a setting, right among the step-by-step responses, mean (lowest to highest) of all 2 "
        "seeds: 1.00 (1.00 to 1.00) greedy, 0.25 (0.00 to 0.50) T = 1.")


def test_runs_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = written(tmp_path, [[(0, False, CAREFUL, 1)]])
    (tmp_path / "key4" / "samples.jsonl").unlink()
    assert styles.main(words) == 2
    message = capsys.readouterr().err
    assert "1 of the sweep's runs are not there, the first is key4" in message
    assert message.count("\n") == 1 and not (tmp_path / "out.json").exists()


def test_the_committed_counts_are_the_headlines():
    """What is in the document must be of the runs beside it."""
    folder = ROOT / "results" / "figures"
    runs = json.loads((folder / "HEADLINE.runs.json").read_text())["runs"]
    [seeds] = json.loads((folder / "HEADLINE.styles.json").read_text()).values()
    for run in runs.values():
        if run["split"] != "test":
            continue
        for when in ("base", "final"):
            for mode, cells in seeds[str(run["seed"])][when].items():
                assert sum(count for count, _ in cells.values()) == run["count"]
                right = sum(right for _, right in cells.values())
                assert right / run["count"] == pytest.approx(run[when][mode]["strict"])
