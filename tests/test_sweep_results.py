"""tools/sweep.py's NAME.runs.json: what is in it stays, and is not mixed with what does not fit."""
import json

import pytest

from helpers import one_error
from test_sweep import document, folder, validation, words, write  # noqa: F401: two are fixtures

from support import files
from tools import jobs, needed, sweep


@pytest.fixture
def finished(folder, validation):  # noqa: F811
    write(folder, validation, title="$x", axis=r"$\bad$", settings=[
        {"name": "4", "series": "a", "lr": 0.05, "flags": {"params": 4}}])
    assert sweep.main(words(folder, "--seeds", "2")) == 0
    return folder


def test_a_finished_table_stays_until_the_next_is_complete(finished, monkeypatch, capsys):
    """Ctrl-C after the first of three new runs: the run is kept, and so is the table."""
    before = document(finished)
    real = sweep.write

    def stops(path, what):
        real(path, what)
        raise KeyboardInterrupt
    with monkeypatch.context() as changed:
        changed.setattr(sweep, "write", stops)
        assert sweep.main(words(finished, "--first-seed", "30")) == 130
    between = document(finished)
    assert between["runs"].keys() > before["runs"].keys()
    assert between | {"runs": before["runs"]} == before
    assert sweep.main(words(finished, "--report")) == 0
    assert sweep.main(words(finished, "--first-seed", "30")) == 0
    assert document(finished)["seeds"] == [30, 31, 32]
    capsys.readouterr()


def test_a_second_sweep_of_the_same_results_is_refused(finished, capsys):
    """It would write over what the first one adds."""
    capsys.readouterr()
    with jobs.alone(finished / "s.runs.json"):
        assert sweep.main(words(finished, "--seeds", "3")) == 2
    one_error(capsys, "another sweep is writing it")
    (finished / "s.runs.json.lock").unlink()
    (finished / "s.runs.json.lock").mkdir()  # cannot be opened, as in a folder without rights
    assert sweep.main(words(finished, "--seeds", "3")) == 2
    one_error(capsys, "cannot be written")
    (finished / "s.runs.json.lock").rmdir()
    assert sweep.main(words(finished, "--seeds", "3")) == 0


def test_runs_of_another_score_are_refused(finished, validation, capsys):  # noqa: F811
    settings = document(finished)["definition"]["settings"]
    write(finished, validation, settings=settings, score="format")
    capsys.readouterr()
    assert sweep.main(words(finished, "--seeds", "3")) == 2
    one_error(capsys, "keeps another score than format")


@pytest.mark.parametrize("text", ["{}", '{"runs": 5}', '{"runs": {}}'])
def test_what_is_no_sweeps_file_is_told_in_one_line(finished, text, capsys):
    (finished / "s.runs.json").write_text(text)
    capsys.readouterr()
    assert sweep.main(words(finished)) == 2
    one_error(capsys, "was not written by a sweep")


@pytest.mark.parametrize("number", [0, -5])
def test_rates_are_chosen_on_some_problems(folder, number, capsys):  # noqa: F811
    spec = json.loads((folder / "s.json").read_text())
    (folder / "s.json").write_text(json.dumps(spec | {"validation": number}))
    assert sweep.main(words(folder)) == 2
    one_error(capsys, "at least 1 problem")


def test_a_large_file_is_read_again(finished, capsys):
    """Paths of v in 85 runs of 350 steps take more than other JSON files may have."""
    found = document(finished)
    next(iter(found["runs"].values()))["steps"] = {"v": "x" * files.LARGEST}
    (finished / "s.runs.json").write_text(json.dumps(found))
    assert sweep.main(words(finished, "--seeds", "3")) == 0
    assert sweep.main(words(finished, "--report")) == 0
    capsys.readouterr()


def test_a_damaged_file_is_told_in_one_line(finished, capsys):
    """Every field of a setting and of one of its runs, gone or of another type."""
    whole = json.dumps(document(finished))
    setting = document(finished)["settings"][0]
    run = setting["runs"][0]
    places = [("settings", 0, name) for name in setting]
    places += [("runs", run, name) for name in document(finished)["runs"][run]]
    told = 0
    for kind, which, name in places:
        for value in (None, 5, "x", {}):
            damaged = json.loads(whole)
            damaged[kind][which][name] = value
            (finished / "s.runs.json").write_text(json.dumps(damaged))
            capsys.readouterr()
            for read, file, *flag in ((needed.main, "s.runs.json"),
                                      (sweep.main, "s.json", "--report")):
                code = read([str(finished / file), *flag])
                assert code in (0, 2), (name, value)
                if code == 2:
                    one_error(capsys, "s.runs.json: damaged")
                    told += 1
    assert told > 20
