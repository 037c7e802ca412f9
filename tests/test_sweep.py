"""tools/sweep.py: the protocol, restarts, the report. Most runs are a stand-in's for train.py."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import ROOT, TOY, one_error, read_rows

from support.errors import InputError
from tools import compare, jobs, sweep, sweep_file, sweep_table

# Scores that are known: on the validation problems the best rate is BEST[params], on the test
# problems a smaller one. A run tells events.jsonl when it begins, goes on and ends.
FAKE = '''
import json, math, os, sys, time
from pathlib import Path
BEST = {"4": 0.05, "13": 0.45}
def tell(event):
    row = {"event": event, "run": out.name, "time": time.time(), "pid": os.getpid()}
    with open(Path(__file__).parent / "events.jsonl", "a") as file:
        file.write(json.dumps(row) + "\\n")
words = sys.argv[1:]
out = Path(words[-1])
if words[0] == "--resume":
    tell("resume")
    words = json.loads((out / "config.json").read_text())["words"]
else:
    out.mkdir(parents=True)
    (out / "config.tmp").write_text(json.dumps({"words": words}))
    (out / "config.tmp").rename(out / "config.json")
    tell("start")
flags = dict(word[2:].split("=", 1) for word in words[:-2])
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
if flags["params"] == "7":
    sys.exit("no luck\\nerror: this run fails")
best = BEST[flags["params"]] if "validation" in flags["data"] else 0.001
wrong = abs(round(math.log(float(flags["lr"]) / best, 3))) + int(flags["seed"]) % 3
summary = {"params": int(flags["params"]), "adapter_bytes": 4 * int(flags["params"]),
           "eval_count": 20, "steps": 5, "tokens": 100, "seconds": 1.0}
rows = []
for when, step, k in (("base", 0, 15), ("final", 5, wrong)):
    for sampled in (False, True):
        right = [float(i >= k + 2 * sampled) for i in range(20)]
        share = sum(right) / 20
        summary[f"{when}_{'sampled' if sampled else 'strict'}"] = share
        summary[f"{when}_{'sampled_' if sampled else ''}format"] = 1.0
        rows += [{"step": step, "sampled": sampled, "prompt": f"p{i}",
                  "scores": {"strict": x, "format": 1.0}} for i, x in enumerate(right)]
(out / "samples.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(out / "summary.tmp").write_text(json.dumps(summary))
log = [{"step": i, "strict": i / 10, "length": 3.0, "gap": None, "v": [0.5, i / 3]}
       for i in range(1, 6)]
(out / "log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in log))
tell("end")
(out / "summary.tmp").rename(out / "summary.json")
'''
SETTINGS = [{"name": "4", "series": "a", "lr": 0.05, "flags": {"params": 4}},
            {"name": "13", "series": "a", "lr": 0.05, "flags": {"params": 13}}]
# 4: 3 rates and 3 seeds; 13: 5 rates and 3 seeds
RUNS = 14
MAIN = ("import sys; from pathlib import Path; from tools import jobs, sweep; "
        "jobs.TRAIN = Path(sys.argv[1]); sys.exit(sweep.main(sys.argv[2:]))")


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    return sweep_file.validation_folder(TOY, 20, tmp_path_factory.mktemp("validation"))


@pytest.fixture
def folder(tmp_path, validation, monkeypatch):
    """A folder with the stand-in and a sweep's file."""
    (tmp_path / "train.py").write_text(FAKE)
    monkeypatch.setattr(jobs, "TRAIN", tmp_path / "train.py")
    write(tmp_path, validation)
    return tmp_path


def write(folder, validation, settings=SETTINGS, **more):
    flags = {"data": str(TOY), "eval-count": 20, "steps": 5}
    spec = {"title": "A title", "axis": "numbers", "flags": flags, "validation": str(validation),
            "tuning_seeds": 1, "settings": settings} | more
    (folder / "s.json").write_text(json.dumps(spec))


def words(folder, *more):
    return [str(folder / "s.json"), "--runs", str(folder / "runs"), "--jobs", "2", *more]


def document(folder):
    return json.loads((folder / "s.runs.json").read_text())


def events(folder, kind):
    path = folder / "events.jsonl"
    return [row for row in (read_rows(path) if path.exists() else []) if row["event"] == kind]


def test_the_protocol(folder, monkeypatch, capsys):
    """A grid that grows at its end; the best rate by validation, where another is the best on the
    test problems; nothing made twice; more seeds cost only themselves."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("FAKE_SECONDS", "0.1")
    assert sweep.main(words(folder)) == 0
    found = document(folder)
    four, thirteen = found["settings"]
    assert [place["lr"] for place in four["grid"]] == [0.0167, 0.05, 0.15]
    assert [place["lr"] for place in thirteen["grid"]] == [0.0167, 0.05, 0.15, 0.45, 1.35]
    assert (four["lr"], thirteen["lr"]) == (0.05, 0.45)
    # it ends one beyond the best; on the test problems the smallest of all would be better
    validation = [place["validation"] for place in thirteen["grid"]]
    assert max(validation) == validation[3] and validation[4] < validation[3]
    for setting in found["settings"]:
        tuning = [found["runs"][k] for place in setting["grid"] for k in place["runs"]]
        final = [found["runs"][k] for k in setting["runs"]]
        assert {(run["split"], run["seed"]) for run in tuning} == {("validation", 100)}
        assert [(run["split"], run["seed"]) for run in final] == [("test", s) for s in range(3)]
    assert len(found["runs"]) == len(events(folder, "start")) == RUNS
    # two at a time, never three
    spans = [(row["time"], 1) for row in events(folder, "start")]
    spans += [(row["time"], -1) for row in events(folder, "end")]
    at_work = [sum(change for _, change in sorted(spans)[:i]) for i in range(len(spans) + 1)]
    assert max(at_work) == 2
    assert (folder / "s.png").read_bytes().startswith(b"\x89PNG")

    assert sweep.main(words(folder)) == 0  # redraws
    assert document(folder) == found and len(events(folder, "start")) == RUNS
    for path in (folder / "runs").glob("*"):  # a clone has the JSON, and not the runs
        path.rename(folder / path.name)
    assert sweep.main(words(folder, "--seeds", "4")) == 0
    assert len(events(folder, "start")) == RUNS + 2
    capsys.readouterr()


@pytest.mark.parametrize("end", ["kill -9", "kill -9 of all", "Ctrl-C"])
def test_a_restart_loses_and_repeats_nothing(folder, monkeypatch, capsys, end):
    """Killed with some runs done and two at work. Its processes go on, and the next sweep waits for
    them, or they are dead too, and go on where they stopped."""
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", MAIN, str(folder / "train.py"), *words(folder)]
    # a shell that runs the tests in the background lets them ignore Ctrl-C
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while len(events(folder, "start")) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    if end == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    elif end == "kill -9":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == (130 if end == "Ctrl-C" else -9)
    if end == "Ctrl-C":  # has ended its runs
        for row in events(folder, "start"):
            with pytest.raises(ProcessLookupError):
                os.kill(row["pid"], 0)
    monkeypatch.setenv("FAKE_SECONDS", "0.02")
    monkeypatch.setattr(sweep_table, "draw", lambda *_: None)
    assert sweep.main(words(folder)) == 0
    started = [row["run"] for row in events(folder, "start")]
    ended = [row["run"] for row in events(folder, "end")]
    assert len(started) == len(set(started)) == len(set(ended)) == len(ended) == RUNS
    resumed = {row["run"] for row in events(folder, "resume")}
    assert len(resumed) == (0 if end == "kill -9" else 2)
    assert set(document(folder)["runs"]) == set(ended)
    capsys.readouterr()


def test_the_table_is_computed_from_the_json(folder, monkeypatch, capsys):
    """Means, ranges and p-values by hand; --report reads nothing else, and runs nothing."""
    monkeypatch.setattr(sweep_table, "draw", lambda *_: None)
    assert sweep.main(words(folder)) == 0
    found = document(folder)
    keys = found["settings"][1]["runs"]
    assert found["table"] == sweep_table.rows(found)
    assert found["runs"][keys[0]]["steps"] == {  # of the log, as far as it goes
        "reward": [0.1, 0.2, 0.3, 0.4, 0.5], "length": [3.0] * 5, "gap": [None] * 5,
        "v": [[0.5, round(i / 3, 6)] for i in range(1, 6)]}
    row = found["table"][1]
    wrong = [round(20 * (1 - found["runs"][k]["final"]["greedy"]["strict"])) for k in keys]
    assert wrong == [6, 7, 8] and row["greedy"]["strict"] == pytest.approx([0.65, 0.6, 0.7])
    assert row["T = 1"]["strict"] == pytest.approx([0.55, 0.5, 0.6])
    # untrained: 15 wrong, and none that was right then is wrong now
    assert row["p_base"]["greedy"] == [compare.p_value(15 - k, 0) for k in wrong]
    assert row["against"] == "4" and row["p_against"]["greedy"] == [0.5, 0.5, 0.5]

    for key, share in zip(keys, (0.1, 0.2, 0.9)):
        found["runs"][key]["final"]["greedy"]["strict"] = share
        found["runs"][key]["final_right"]["greedy"] = found["runs"][key]["base_right"]["greedy"]
    (folder / "s.runs.json").write_text(json.dumps(found))
    for path in ("train.py", "events.jsonl"):
        (folder / path).unlink()
    capsys.readouterr()
    assert sweep.main(words(folder, "--report")) == 0
    printed = capsys.readouterr().out
    line, = (line for line in printed.splitlines() if line.startswith("| 13 "))
    assert line.startswith("| 13 | 13 | 0.45 | 0.400 (0.100 to 0.900) | 1.000 (1.000 to 1.000) |")
    assert line.endswith("| 1.000, 0.016 | 0.004, 0.500 (4) |")
    assert "| untrained | 0 |  | 0.250 |" in printed
    text = " ".join(printed.split())
    assert "seeds 0, 1, 2 on 20 test problems" in text and "1,280 sampled responses" in text
    assert all(len(line) <= 100 for line in printed.splitlines() if not line.startswith("|"))


def test_of_equal_rates_the_middle_one_is_taken():
    assert sweep.best_place({-1: 0.0, 0: 0.0, 1: 0.0}) == 0
    assert sweep.best_place({-1: 0.5, 0: 0.5, 1: 0.2}) == 0
    assert sweep.best_place({-1: 0.5, 0: 0.4, 1: 0.2}) == -1


def test_what_decides_a_result_is_in_the_key(folder, validation, tmp_path):
    """Other data under the old name, another flag, seed, rate or split: another run. Where it is
    written, and how it is cut into parts: the same."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text((validation / f"{name}.jsonl").read_text())

    def key(lr=0.1, seed=0, split="test", **flags):
        spec = {"flags": {"data": str(data)}, "validation": str(validation)}
        splits = sweep_file.prepare(spec, {"flags": {"params": 13} | flags}, tmp_path)
        return sweep_file.request(splits, lr, seed, split)["key"]
    first = key()
    assert first == key(**{"eval-every": 3, "rollout-rows": 7, "group": 8})
    assert len({first, key(lr=0.3), key(seed=1), key(split="validation"), key(rank=4)}) == 5
    with open(data / "train.jsonl", "a") as file:
        file.write('{"question": "1 + 1?", "answer": "2"}\n')
    assert key() != first


def test_a_model_folders_own_flags_are_no_contents(tmp_path):
    """They are in the key as flags: the toy got another rank, and all other runs stayed known."""
    (tmp_path / "config.json").write_text("{}")
    before = sweep_file.contents(tmp_path)
    (tmp_path / "tinylora.json").write_text("{}")
    assert sweep_file.contents(tmp_path) == before
    (tmp_path / "config.json").write_text("[]")
    assert sweep_file.contents(tmp_path) != before


def test_validation_problems_are_in_no_other_set(validation):
    sets = [{row["question"] for row in read_rows(path)}
            for path in (validation / "test.jsonl", TOY / "train.jsonl", TOY / "test.jsonl")]
    assert len(sets[0]) == 20 and not sets[0] & (sets[1] | sets[2])
    assert (validation / "train.jsonl").read_bytes() == (TOY / "train.jsonl").read_bytes()


def test_the_figures_can_be_run():
    """Every committed file: flags that train.py takes, equal budgets, no setting twice."""
    paths = [p for p in sorted(sweep_file.FIGURES.glob("*.json")) if p.suffixes == [".json"]]
    assert {"DIRECTIONS", "ES", "F1", "F2", "F3", "F4", "F7", "F8"} <= {path.stem for path in paths}
    for path in paths:
        spec = sweep_file.read_definition(path)
        spec["validation"] = "toy"
        if "model" in spec["flags"]:  # a folder that only who runs it has
            spec["flags"]["model"] = str(TOY)
        models = [setting["flags"].pop("model", "") + setting["flags"].pop("adapter", "")
                  for setting in spec["settings"]]  # those of F3 and SEEDS are made first
        prepared = [sweep_file.prepare(spec, setting, None) for setting in spec["settings"]]
        sweep_file.check_budgets(path, prepared)
        keys = {model + sweep_file.request(splits, 0.1, 0, "test")["key"]
                for model, splits in zip(models, prepared)}
        assert len(keys) == len(prepared)


def test_committed_tables_are_those_of_their_runs():
    for path in sweep_file.FIGURES.glob("*.runs.json"):
        found = json.loads(path.read_text())  # of an unfinished sweep: runs alone
        if found["settings"]:
            assert found["table"] == sweep_table.rows(found), path


@pytest.mark.parametrize("change, message", [
    ({"settings": []}, "has no settings"), ({"colour": 1}, "'colour' is not one of"),
    ({"flags": {"seed": 1}}, "--seed is the sweep's own"),
    ({"flags": {"eval-data": "math500"}}, "--eval-data is the sweep's own"),
    ({"flags": {"parms": 1}}, "unrecognized arguments: --parms=1"),
    ({"settings": [SETTINGS[0] | {"lr": "0.1"}]}, "'0.1' will not do for 'lr'"),
    ({"settings": SETTINGS * 2}, "two settings have one name"),
    ({"settings": [SETTINGS[0], SETTINGS[1] | {"flags": {"params": 13, "group": 4}}]},
     "equally many responses: 1280, 640"),
    ({"settings": [SETTINGS[0], SETTINGS[1] | {"flags": {"params": 13, "max-new-tokens": 9}}]},
     "its settings have several --max-new-tokens: ")])
def test_a_wrong_file_is_told_in_one_line(folder, validation, capsys, change, message):
    write(folder, validation, **change)
    assert sweep.main(words(folder)) == 2
    one_error(capsys, message)
    assert not events(folder, "start")


def test_other_mistakes_are_told_in_one_line(folder, validation, capsys, monkeypatch):
    """An unknown figure, a file that is not there, seeds that chose the rates, no JSON yet; a run
    that fails; no matplotlib, after the table."""
    for given, message in ((["F99"], "F99: no such file or figure; the figures are CURVE, DIR"),
                           (["nothing.json"], "nothing.json: no such file"),
                           (words(folder, "--first-seed", "101"), "rates are chosen on seeds 100"),
                           (words(folder, "--report"), "s.runs.json: no such file")):
        assert sweep.main(given) == 2
        one_error(capsys, message)
    write(folder, validation, [SETTINGS[0], SETTINGS[0] | {"name": "7", "flags": {"params": 7}}])
    assert sweep.main(words(folder)) == 2
    one_error(capsys, "3 of the runs failed; the first, see ", ".txt: error: this run fails")
    assert len(document(folder)["runs"]) == 6  # those of the other setting are done
    assert sweep.main(words(folder, "--report")) == 2
    one_error(capsys, "its sweep is not finished")
    write(folder, validation, SETTINGS[:1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert sweep.main(words(folder)) == 2
    captured = capsys.readouterr()
    assert "| untrained |" in captured.out
    assert captured.err == "error: drawing needs matplotlib: pip install matplotlib\n"


def test_the_command_of_the_issue():
    command = [sys.executable, "results/sweep.py", "F99", "--seeds", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: F99: no such file or figure")


def test_a_run_of_this_program(tmp_path, validation):
    """What is kept of a real run; right answers paired by problem."""
    spec = {"flags": {"steps": 1, "prompts": 2, "group": 2, "eval-count": 8, "eval-every": 0},
            "validation": str(validation)}
    splits = sweep_file.prepare(spec, {"flags": {"params": 4}}, tmp_path)
    run = sweep_file.request(splits, 0.5, 3, "test")
    kept = {}
    jobs.work_off(lambda: [] if kept else [run],
                  lambda run, out: kept.update(sweep.record(run, out, "format")), tmp_path, 1)
    assert (kept["params"], kept["seed"], kept["lr"], kept["budget"]) == (4, 3, 0.5, 4)
    summary = json.loads((tmp_path / run["key"] / "summary.json").read_text())
    assert kept["final"]["T = 1"] == {"strict": summary["final_sampled"],
                                      "lenient": summary["final_sampled_lenient"],
                                      "format": summary["final_sampled_format"]}
    for mode, right in kept["base_right"].items():
        assert int(right, 16).bit_count() == round(8 * kept["base"][mode]["format"])
    assert kept["command"].startswith("python train.py --steps=1 --prompts=2 ")
    with pytest.raises(InputError, match="score 'taste': the scores are strict"):
        sweep.record(run, tmp_path / run["key"], "taste")


def test_a_mean_is_within_its_range():
    """0.998 three times: their sum by 3 is less, and the picture's bars would have no length."""
    runs = [{mode: {"strict": 0.998} for mode in ("greedy", "T = 1")}] * 3
    assert sweep_table.spreads(runs, "greedy") == {"strict": [0.998] * 3}
