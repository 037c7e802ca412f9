"""tools/path.py: the numbers by hand, evaluations by train.py's own, resumed; path_picture.py."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import ROOT, TINY_RUN, one_error, read_rows

import train
from support import adapter_file
from support.errors import InputError
from tools import opened, path, path_picture

STEPS = 10
COUNT = "4"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose log, and adapter, say that it took this path: 4 numbers, 10 steps."""
    folder = tmp_path_factory.mktemp("path")
    out = folder / "run"
    words = ["--params", "4", *TINY_RUN, "--max-new-tokens", "40", "--steps", "10", "--seed", "3"]
    assert train.main([*words, "--out", str(out)]) == 0
    lay(out, made_up())
    return out


def made_up():
    """v after each step (10, 4): two numbers grow, one turns round, one stays 0."""
    t = np.arange(1, STEPS + 1)
    return np.stack([0.2 * t, -0.1 * t, 0.1 * (5 - abs(t - 5)), 0 * t], 1)


def lay(out, v):
    rows = read_rows(out / "log.jsonl")
    rows = [row | {"v": x, "lr": 0.05} for row, x in zip(rows, v.tolist())]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it: (folder, the JSON's path)."""
    out = tmp_path / "run"
    out.mkdir()
    for file in trained.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out, tmp_path / "p.json"


@pytest.fixture
def calls(monkeypatch):
    """Labels of the evaluations made; each gives what its model's v sums to."""
    made = []

    def evaluate(run, problems, label, step, sampled=False):
        made.append(label)
        assert not list(Path(run.args.out).iterdir())  # not the run's own folder
        total = run.model.layers[0].self_attn.q_proj.v.sum().item()
        return {"length": 3.0, "strict": total / 10 - sampled, "format": 1.0}
    monkeypatch.setattr(train, "evaluate", evaluate)
    return made


def measured(out, file, *more):
    assert path.main([str(out), "--out", str(file), "--count", COUNT, *more]) == 0
    return json.loads(file.read_text())["runs"][str(out)]


def test_a_straight_line_and_a_corner():
    line = np.outer(np.arange(5.0), [3.0, 4.0])
    assert path.straightness(line) == pytest.approx((1, 1))
    corner = np.array([[0, 0], [3.0, 0], [3, 4]])  # 5 away, 7 walked
    assert path.straightness(corner)[0] == pytest.approx(5 / 7)
    centred = corner - corner.mean(0)
    values = np.linalg.eigvalsh(centred.T @ centred)
    assert path.straightness(corner)[1] == pytest.approx(values[-1] / values.sum())


def test_random_walks_have_the_paths_step_lengths():
    """Of one step, a straight line. Of many equal ones, 1 / sqrt(steps) on average (in one
    dimension less); a walk whose first step is all of it is straight too."""
    assert path.random_walks(np.array([[0, 0], [3.0, 4]])) == pytest.approx((1, 1))
    many = np.outer(np.arange(101.0), np.ones(13))
    distance, first = path.random_walks(many)
    assert distance == pytest.approx(0.1, abs=0.02) and 0.4 < first < 0.75
    many[1:] += 10_000
    assert path.random_walks(many)[0] > 0.99


def test_the_prediction():
    """15% of 20 steps are 3. Over the sum of the rates, so a warm-up is no bend; by least squares
    through the start, not by the last step."""
    rates = np.array([0.5] + [1.0] * 19)
    straight = np.outer(np.concatenate([[0], rates.cumsum()]), [1.0, -2.0])
    seen, predicted = path.extrapolate(straight, rates)
    assert seen == 3 and predicted == pytest.approx(straight[-1])
    bent = straight.copy()
    bent[3:] = 100  # the third step, and what nobody has seen
    t = rates.cumsum()[:3]
    want = t @ bent[1:4, 0] / (t @ t) * rates.sum()
    assert path.extrapolate(bent, rates)[1][0] == pytest.approx(want)
    found = path.numbers(straight, rates)
    assert (found["cosine"], found["length_ratio"]) == pytest.approx((1, 1))
    assert path.numbers(straight * [[1.0, 0.5]], rates)["early_steps"] == 3
    assert path.extrapolate(straight[:3], rates[:2])[0] == 1  # at least one


def test_what_is_evaluated(run, calls, capsys):
    """Every point's v is on the model while it is evaluated, both modes; what they are."""
    out, file = run
    found = measured(out, file)
    last = made_up()[-1]
    assert found["seed"] == 3 and found["count"] == 4
    assert found["path"][0] == [0, 0, 0, 0] and found["path"][-1] == pytest.approx(last)
    points = found["points"]
    for point in points.values():
        assert point["greedy"]["strict"] == pytest.approx(sum(point["v"]) / 10, abs=1e-6)
        assert point["T = 1"]["strict"] == pytest.approx(sum(point["v"]) / 10 - 1, abs=1e-6)
    for s in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2):
        assert points[f"{s:g} x"]["v"] == pytest.approx(s * last)
    # 15% of 10 steps are 2; both are on the line, 10 steps of which are 2, -1, 1, 0
    assert points["early"]["v"] == pytest.approx([0.4, -0.2, 0.2, 0])
    assert points["extrapolated"]["v"] == pytest.approx([2, -1, 1, 0])
    scale = math.sqrt(5 / 6)
    assert points["1 x predicted"]["v"] == pytest.approx([2 * scale, -scale, scale, 0], abs=1e-6)
    assert points["0.5 x predicted"]["v"] == pytest.approx([scale, -scale / 2, scale / 2, 0],
                                                           abs=1e-6)
    line = path_picture.multiples(found, " x predicted")
    assert [s for s, _ in line] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2]
    assert line[0][1] == points["0 x"] and line[4][1] == points["1 x predicted"]
    assert points["only 2"]["v"] == pytest.approx([0, -1, 0, 0])
    assert points["without 2"]["v"] == pytest.approx([2, 0, 0, 0])
    # v is (2, -1, 0, 0): only 3 and only 4 are 0 x, without 3 and without 4 are 1 x, and so on
    assert len(points) == 8 + 2 + 7 + 8 and len(calls) == 2 * (8 + 2 + 7 + 2)
    printed = capsys.readouterr().out
    assert "| seed 3 | 10 | 2.24 |" in printed
    assert "| seed 3: number | its value | alone | all but it |" in printed
    assert "| seed 3 | trained | 0.000, -1.000 | 0.025, -0.975 |" in printed
    assert "strict on 4 problems: greedy, then T = 1." in printed


def test_nothing_is_evaluated_twice(run, calls, monkeypatch, capsys):
    """Stopped after 5 evaluations it makes the rest; then nothing; with another count, all; and
    after the run was made anew, what is new."""
    out, file = run
    inner = train.evaluate

    def stops(*args, **more):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return inner(*args, **more)
    monkeypatch.setattr(train, "evaluate", stops)
    words = [str(out), "--out", str(file), "--count", COUNT]
    assert path.main(words) == 130
    half = json.loads(file.read_text())["runs"][str(out)]
    assert len(half["points"]) >= 2 and all(len(point) == 3 for point in half["points"].values())
    monkeypatch.setattr(train, "evaluate", inner)
    whole = measured(out, file)
    total = 2 * (8 + 2 + 7 + 2)
    assert len(calls) == total + 1  # one mode of a point whose other mode was not
    with monkeypatch.context() as changed:
        changed.setattr(opened, "opened", None)  # the model is not even loaded
        assert measured(out, file) == whole
    assert measured(out, file, "--count", "5")["count"] == 5
    assert len(calls) == 2 * total + 1
    v = made_up()
    v[-1] = [2, 0, 0, 0]  # "without 2" of before
    lay(out, v)
    again = measured(out, file, "--count", "5")
    assert again["points"]["1 x"]["greedy"]["strict"] == pytest.approx(0.2)
    assert again["points"]["0.5 x"]["v"] == [1, 0, 0, 0]
    capsys.readouterr()


def test_without_coordinates(run, calls, capsys):
    out, file = run
    points = measured(out, file, "--no-coordinates")["points"]
    assert not {"only 1", "without 1"} & points.keys() and len(calls) == 2 * (8 + 2 + 7)
    assert "its value" not in capsys.readouterr().out
    assert not file.with_suffix(".coordinates.png").exists()
    measured(out, file)
    assert len(calls) == 2 * (8 + 2 + 7 + 2)
    assert len(measured(out, file, "--no-coordinates")["points"]) == 25  # what is there, stays
    capsys.readouterr()


def test_the_scores_are_train_pys(run, tmp_path, capsys):
    """The trained v as --eval-only evaluates its adapter; nothing is left in the run's folder."""
    out, file = run
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes((out / "adapter.safetensors").read_bytes())
    lay(out, np.array([load_file(adapter)["v"].tolist()] * STEPS) + 0.5)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    found = measured(out, file, "--no-coordinates", "--count", "8")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    with safe_open(adapter, "pt") as stored:
        metadata = stored.metadata()
    save_file({"v": load_file(adapter)["v"] + 0.5}, adapter, metadata)
    words = ["--eval-only", "--adapter", str(adapter), "--eval-count", "8"]
    assert train.main([*words, "--max-new-tokens", "40", "--out", str(tmp_path / "e")]) == 0
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    point = found["points"]["1 x"]
    assert point["greedy"]["strict"] == summary["strict"]
    assert point["T = 1"]["lenient"] == summary["sampled_lenient"]
    base = json.loads((out / "summary.json").read_text())
    assert found["points"]["0 x"]["greedy"]["lenient"] == base["base_lenient"]
    assert found["points"]["0 x"] != point
    capsys.readouterr()


def test_v_is_what_was_added_to_an_adapter(run, calls, tmp_path, capsys):
    """A run that began from an adapter: 0 x is that adapter."""
    out, file = run
    adapter = tmp_path / "start.safetensors"
    with safe_open(out / "adapter.safetensors", "pt") as stored:
        metadata = stored.metadata()
        v = stored.get_tensor("v")
    save_file({"v": v * 0 + 1}, adapter, metadata)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"adapter": str(adapter)}))
    lay(out, made_up() + 1)
    points = measured(out, file)["points"]
    assert points["0 x"]["v"] == [0, 0, 0, 0] and points["1 x"]["v"] == pytest.approx([2, -1, 0, 0])
    assert points["0 x"]["greedy"]["strict"] == pytest.approx(0.4)  # four ones
    assert points["1 x"]["greedy"]["strict"] == pytest.approx(0.5)
    capsys.readouterr()


def test_pictures_and_tables_from_the_json_alone(run, calls, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, file = run
    measured(out, file)
    pictures = [file.with_suffix(end) for end in (".png", ".line.png", ".coordinates.png")]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    document = json.loads(file.read_text())
    entry = document["runs"].pop(str(out))
    document["runs"] = {"a": entry, "b": entry | {"points": {"0 x": entry["points"]["0 x"]}}}
    file.write_text(json.dumps(document))
    for old in out.iterdir():
        old.unlink()
    capsys.readouterr()
    assert path_picture.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "| seed 3 | 10 |" in printed and all(str(p) in printed for p in pictures)
    assert all(picture.exists() for picture in pictures)
    document["runs"]["b"] = entry  # two runs of one seed: told apart by their folders
    assert set(path_picture.titles(document["runs"]).values()) == {"a", "b"}


def test_a_damaged_file_is_told_in_one_line(run, calls, capsys):
    """Every field of an entry and of one of its points, gone or of another type; another type where
    nobody reads it may pass."""
    pytest.importorskip("matplotlib")
    out, file = run
    measured(out, file)
    whole = file.read_text()
    entry = json.loads(whole)["runs"][str(out)]
    told = []
    for name in (*entry, *entry["points"]["1 x"]):
        for value in (None, "x"):
            damaged = json.loads(whole)
            place = damaged["runs"][str(out)]
            (place if name in entry else place["points"]["1 x"])[name] = value
            file.write_text(json.dumps(damaged))
            capsys.readouterr()
            code = path_picture.main([str(file)])
            assert code in (0, 2), (name, value)
            if code == 2:
                one_error(capsys, "p.json: ")
                told.append(name)
            if name == "points":
                assert path.main([str(out), "--out", str(file), "--count", COUNT]) == 2
                one_error(capsys, "p.json: damaged")
    assert {"path", "points", "straightness", "greedy"} <= set(told)  # nobody reads this v


def test_mistakes_are_told_in_one_line(run, calls, tmp_path, capsys):
    out, file = run

    def refused(message, folder=out, to=file):
        assert path.main([str(folder), "--out", str(to)]) == 2
        one_error(capsys, message)
        assert not calls
    refused("its name must end in .json", to=tmp_path / "p.png")
    refused("nowhere", folder=tmp_path / "nowhere")
    (tmp_path / "other.json").write_text('{"runs": 3}')
    refused("was not written by tools.path", to=tmp_path / "other.json")
    for changed in ("summary.json", "log.jsonl"):
        text = (out / changed).read_text()
        if changed == "summary.json":
            (out / changed).write_text(text.replace('"tinylora"', '"lora"'))
            refused("trained by --method lora")
            (out / changed).unlink()
            refused("is not finished")
        else:
            lay(out, np.zeros((STEPS, 4)))
            refused("v ends where it began")
            rows = [{k: x for k, x in row.items() if k != "v"} for row in read_rows(out / changed)]
            (out / changed).write_text("".join(json.dumps(row) + "\n" for row in rows))
            refused("does not hold v at each step")
        (out / changed).write_text(text)
    (tmp_path / "empty.json").write_text('{"runs": {}}')
    assert path_picture.main([str(tmp_path / "empty.json")]) == 2
    one_error(capsys, "has no run that is measured")
    with pytest.raises(InputError):
        path_picture.load(tmp_path / "gone.json")


def test_the_committed_paths_are_those_of_the_runs_beside_them():
    """Each ends at what its run's adapter holds."""
    runs = path_picture.load(ROOT / "results" / "path" / "path.json")
    assert len(runs) == 5
    for folder, run in runs.items():
        v, _ = adapter_file.read(ROOT / folder / "adapter.safetensors")
        assert run["path"][-1] == pytest.approx(v.tolist(), abs=1e-6)
        assert len(run["path"]) == len(read_rows(ROOT / folder / "log.jsonl")) + 1
