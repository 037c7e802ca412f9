"""tools/plot.py and tools/claim.py: pictures of runs."""
import json
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT, TINY_RUN, one_error

import train
from support.errors import InputError
from tools import claim, plot
from tools.runs import NORM, REWARD, by_setting, read_run

RESULTS = ROOT / "results"
SEEDS = sorted(RESULTS.glob("toy-seed*"))
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def matplotlib():
    pytest.importorskip("matplotlib", reason="needs matplotlib (requirements-dev.txt)")


def run_folder(path, rows=(), summary=None, **config):
    """A run's folder, written by hand."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"method": "tinylora", "seed": 0} | config))
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.mark.parametrize("names,words", [
    ("", "5 runs of 1 setting\n"), ("going", "6 runs of 1 setting\n"),
    ("going compare-full compare-lora", "8 runs of 3 settings\n")])
def test_seeds_are_one_setting(names, words, tmp_path, capsys):
    """Five seeds are one line with a band; a run that still goes on is drawn too."""
    going = shutil.copytree(RESULTS / "toy-seed0", tmp_path / "going")
    (going / "summary.json").unlink()
    runs = [str(x) for x in SEEDS]
    runs += [str(going if name == "going" else RESULTS / name) for name in names.split()]
    out = tmp_path / "p.png"
    assert plot.main([*runs, str(out)]) == 0
    assert capsys.readouterr().out.endswith(words) and out.read_bytes().startswith(PNG)


def test_what_is_rewarded_has_its_panel_at_t_1(tmp_path):
    """The arithmetic runs are paid for the lenient score: strict, at T = 1, stays at 0."""
    runs = [read_run(path) for path in sorted(RESULTS.glob("arithmetic-seed*"))]
    assert len(by_setting(runs)) == 1 and len(runs) == 3
    for run in runs:
        ends = run.points["held-out lenient, T = 1"]
        assert list(ends) == [34, 0] or list(ends) == [0, 34]
        assert ends[34] == run.summary["final_sampled_lenient"]
        assert "held-out format, T = 1" not in run.points


def test_a_run_of_this_program(tmp_path, capsys):
    """What train.py writes now beside what it wrote before: --params 13 and its default are one
    setting, and so are runs on either engine; any names of scores have their panels."""
    flags = [*TINY_RUN, "--eval-every", "1", "--eval-count", "2"]
    runs = []
    for i, more in enumerate((["--params", "13"], ["--engine", "plain"], ["--seed", "2"])):
        runs.append(str(tmp_path / str(i)))
        assert train.main([*flags, *more, "--out", runs[-1]]) == 0
    capsys.readouterr()
    out = tmp_path / "p.svg"
    assert plot.main([*runs, str(out)]) == 0
    assert "3 runs of 1 setting" in capsys.readouterr().out
    run = read_run(runs[0])
    assert run.scores == ["strict", "lenient", "format"]
    assert sorted(run.points["held-out format, greedy"]) == [0, 1, 2]
    assert sorted(run.points["held-out strict, T = 1"]) == [0, 2]


def test_scores_of_any_name(tmp_path):
    """A task's names; T = 1 during the training where a row has it."""
    rows = [{"step": 1, "share": 0.1, "eval_share": 0.2, "eval_length": 3, "v_norm": 0.1},
            {"step": 2, "share": 0.3, "eval_share": 0.4, "eval_sampled_share": 0.5, "loss": None}]
    folder = run_folder(tmp_path / "run", rows, reward="share")
    run = read_run(folder)
    assert run.scores == ["share"]
    assert run.points == {"held-out share, greedy": {1: 0.2, 2: 0.4},
                          "held-out share, T = 1": {2: 0.5}, REWARD: {0: 0.1, 1: 0.3},
                          NORM: {1: 0.1}}
    summary = {"steps": 2, "base_share": 0.0, "final_share": 0.6, "base_sampled": 0.1,
               "final_sampled": 0.7}
    run = read_run(run_folder(tmp_path / "ended", rows[:1], summary, reward="share"))
    assert run.points["held-out share, greedy"] == {0: 0.0, 1: 0.2, 2: 0.6}
    assert run.points["held-out share, T = 1"] == {0: 0.1, 2: 0.7}


def test_legends_say_what_differs(tmp_path):
    """No sums over texts; data by the last part of their path, or the whole where that is alike."""
    def texts(*configs):
        runs = []
        for i, config in enumerate(configs):
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            config = {"problems": f"{i}abcdef", "chat_format": f"{i}"} | config
            runs.append(read_run(run_folder(folder, [{"step": 1}], **config)))
        return plot.labels(by_setting(runs))
    assert texts({"lr": 0.05, "data": "a/easy"}, {"lr": 0.05, "data": "a/hard"}) == [
        "data easy (1 seed)", "data hard (1 seed)"]
    assert texts({"data": "a/easy"}, {"data": "b/easy"}) == [
        "data a/easy (1 seed)", "data b/easy (1 seed)"]
    assert texts({"eval_count": 8}, {"eval_count": 500}) == [
        "eval_count 8 (1 seed)", "eval_count 500 (1 seed)"]
    band = "(2 seeds: mean, and from lowest to highest)"
    assert texts({"seed": 0}, {"seed": 1}) == [f"all runs {band}"]
    assert texts({"method": "lora", "lr": 1e-3}, {"lr": 0.05}, {"lr": 0.1}) == [
        "lora (1 seed)", "tinylora, lr 0.05 (1 seed)", "tinylora, lr 0.1 (1 seed)"]
    shape = {"groups": 13, "u": 1, "rank": 2, "tie": "tiled", "n_tie": 0}
    assert texts({"params": 13, "trained": shape}, {"params": None, "trained": shape}) == [
        f"all runs {band}"]


def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "evaluation", eval_only=True)
    run_folder(tmp_path / "empty")
    (run_folder(tmp_path / "started") / "log.jsonl").unlink()
    (run_folder(tmp_path / "damaged") / "log.jsonl").write_text('{"step": 1}\n{bad\n')
    run_folder(tmp_path / "other", [{"epoch": 1}])
    good = str(SEEDS[0])
    for names, words in ((["nowhere"], "nowhere"), (["evaluation"], "is an evaluation"),
                         (["started"], "log.jsonl"), (["damaged"], "line 2"),
                         (["other"], "not those of a run"), (["empty"], "nothing to draw"),
                         ([str(ROOT / "toy")], "log.jsonl"), ([], "RUN"), (["a.png"], "RUN"),
                         ([good, "/proc/x.png"], "cannot be written")):
        assert plot.main(names) == 2
        one_error(capsys, words)
    assert not (tmp_path / "plot.png").exists()


def test_without_matplotlib(capsys, monkeypatch):
    """A laptop without the packages for development is told which one it takes."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for flags in ([], ["--claim"]):
        assert plot.main([*flags, "nowhere"]) == 2
        one_error(capsys, "pip install matplotlib")


def test_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tools.plot", str(SEEDS[0]),
                           str(tmp_path / "p.png")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 run of 1 setting" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------- --claim

def drawn(monkeypatch, names, out):
    """The figure that --claim draws of results/NAMES."""
    figures = []
    monkeypatch.setattr(claim, "save", lambda figure, out: figures.append(figure))
    claim.draw([read_run(RESULTS / name) for name in names], out)
    return figures[0]


def test_the_claim_in_one_panel(monkeypatch):
    """What the README's first picture must say: model, numbers, bytes; seeds as a band that the
    legend explains; greedy and T = 1; untrained, LoRA and full."""
    names = [*(seed.name for seed in SEEDS), "compare-lora", "compare-full"]
    figure = drawn(monkeypatch, names, "x.png")
    axis, = figure.axes
    assert axis.get_title() == "toy: 13 trained numbers, 52 bytes"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["greedy: mean of 5 seeds, band from lowest to highest",
                      "T = 1, before and after: mean of 5 seeds, bars from lowest to highest",
                      "untrained, LoRA (9,728 numbers), full (862,336 numbers); colours as above"]
    summaries = [json.loads((RESULTS / name / "summary.json").read_text()) for name in names]
    final = [sum(s[f"final_{key}"] for s in summaries[:5]) / 5 for key in ("strict", "sampled")]
    texts = [text.get_text() for text in axis.texts]
    assert f"13 numbers {final[0]:.2f} (greedy)" in texts
    assert f"13 numbers {final[1]:.2f} (T = 1)" in texts
    assert "untrained 0.14 (greedy)" in texts and "untrained 0.33 (T = 1)" in texts
    assert "LoRA 1.00, full 1.00 (greedy)" in texts
    heights = sorted(text.xyann[1] for text in axis.texts)
    assert all(b - a >= claim.DISTANCE - 1e-9 for a, b in zip(heights, heights[1:]))
    curve = axis.lines[0]
    assert list(curve.get_xdata()) == [0, 10, 20, 30, 40, 50]
    dashed = [line for line in axis.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert len(dashed) == 6
    assert figure.axes[0].get_ylabel() == "accuracy (strict) on 500 held-out problems"


def test_one_run_alone(monkeypatch, capsys):
    figure = drawn(monkeypatch, ["toy-seed0"], "x.png")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["greedy: one run", "T = 1, before and after: one run",
                      "untrained; colours as above"]
    assert "1 run as the curve" in capsys.readouterr().out


@pytest.mark.parametrize("names,words", [
    (["compare-lora"], "these have 0"), (["toy-seed0", "toy-seed1 es"], "these have 2"),
    (["toy-seed0", "compare-lora", "compare-lora sft"], "two settings of --method lora")])
def test_runs_that_make_no_claim(names, words, tmp_path, capsys):
    """"NAME ALGO": the run NAME, made to say that --algo was another."""
    folders = []
    for name in names:
        source, _, algo = name.partition(" ")
        folders.append(shutil.copytree(RESULTS / source, tmp_path / name))
        if algo:
            config = json.loads((folders[-1] / "config.json").read_text())
            (folders[-1] / "config.json").write_text(json.dumps(config | {"algo": algo}))
    assert plot.main(["--claim", *map(str, folders)]) == 2
    one_error(capsys, words)


def test_texts_do_not_overlap():
    assert claim.spread([1.0, 0.99, 0.98, 0.2]) == pytest.approx([1.0, 0.94, 0.88, 0.2])


def test_a_run_without_evaluation(tmp_path):
    run = read_run(run_folder(tmp_path / "run", [{"step": 1, "strict": 0.5}]))
    with pytest.raises(InputError, match="no evaluation"):
        claim.draw([run], "x.png")
