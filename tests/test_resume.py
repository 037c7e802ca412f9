"""A run that is stopped, by whatever and wherever, goes on as if nothing had happened.

    python -m pytest tests/test_resume.py        kills three runs
    python tests/test_resume.py 20               twenty kills at random moments, each compared
"""
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import ROOT, one_error, read_rows

import grpo
import train
from support import resume

RUN = ["--steps", "5", "--prompts", "4", "--group", "2", "--minibatches", "2", "--kl", "0.01",
       "--reward", "lenient", "--max-new-tokens", "16", "--eval-count", "4", "--eval-every", "2",
       "--seed", "3"]
CLOCKS = ("seconds", "tokens_per_s", "memory_gb")  # what may differ in log rows and summary


def without_clocks(row):
    return {name: x for name, x in row.items() if name not in CLOCKS}


def record(out):
    """(tensors by file, everything else) that a run leaves behind, but for the time it took."""
    assert not list(out.glob("*.tmp*"))  # nothing of a broken write
    tensors = {str(path.relative_to(out)): load_file(path) for path in out.rglob("*.safetensors")
               if not path.name.startswith("state-")}
    states = [resume.read(out / name, out) for name in resume.FILES]
    done, tensors["state"] = max(states, key=lambda state: state[0]["step"])
    facts = [done["step"], done["tokens"], done["base"]]
    facts += [[without_clocks(row) for row in read_rows(out / name)] for name in resume.LOGS]
    facts.append(without_clocks(json.loads((out / "summary.json").read_text())))
    return tensors, facts


def assert_same(a, b):
    """Two runs, equal bit for bit."""
    tensors, facts = record(a)
    others, more = record(b)
    assert facts == more and tensors.keys() == others.keys()
    for file in tensors:
        assert tensors[file].keys() == others[file].keys()
        for name, x in tensors[file].items():
            assert torch.equal(x, others[file][name]), f"{file}: {name}"


def start(*flags):
    return subprocess.Popen([sys.executable, "-u", "train.py", *map(str, flags)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop_at(monkeypatch, call, module=grpo, name="optimizer_step"):
    """Ctrl-C in this call of a function, of an update if nothing else is said, from now on."""
    calls = []
    function = getattr(module, name)

    def stopping(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args)
    monkeypatch.setattr(module, name, stopping)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*RUN, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was stopped in its fourth step, between the two updates."""
    out = tmp_path_factory.mktemp("part") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 8)
        assert train.main([*RUN, "--out", str(out)]) == 130
    return out


@pytest.fixture
def stopped(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def kill(out):
    """kill -9 at a random moment: after a random line of the output and up to a second more.

    Returns a sentence about what there was then.
    """
    process = start(*RUN, "--out", out)
    lines = random.randint(1, 16)
    pause = random.random() ** 2
    for _ in range(lines):
        process.stdout.readline()
    while not (out / "config.json").exists():  # before, there is no run to go on with
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    time.sleep(pause)
    process.kill()
    process.communicate()
    states = sum((out / name).exists() for name in resume.FILES)
    return (f"{pause:4.2f} s after line {lines:2d}, {states} states, "
            f"{resume.size(out / 'log.jsonl'):4d} bytes of log")


def test_kill_9_at_random_moments(tmp_path, undisturbed):
    """Rows of steps done twice, half a row, Adam's moments or the base model's evaluation lost, a
    state half written."""
    folders = [tmp_path / str(i) for i in range(int(os.environ.get("TINYLORA_KILLS", 3)))]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(kill, folders))
    for out in folders:
        assert train.main(["--resume", str(out)]) == 0
        assert_same(out, undisturbed)


def test_ctrl_c_between_two_updates_then_resume(stopped, undisturbed, capsys):
    """The half step's v or Adam moments in the resumed run; config.json changed by resuming. A
    finished run is left alone."""
    config = (stopped / "config.json").read_text()
    assert len(read_rows(stopped / "log.jsonl")) == 3
    assert train.main(["--resume", str(stopped)]) == 0
    assert "after step 3" in capsys.readouterr().out
    assert_same(stopped, undisturbed)
    assert (stopped / "config.json").read_text() == config
    assert train.main(["--resume", str(stopped)]) == 0
    assert "finished" in capsys.readouterr().out
    assert_same(stopped, undisturbed)


def test_a_damaged_newest_state_falls_back(stopped, undisturbed, capsys):
    """One bit of the newest state is wrong: the older one is used, and said to be used."""
    newest, older = sorted((stopped / name for name in resume.FILES), reverse=True,
                           key=lambda path: resume.read(path, stopped)[0]["step"])
    data = newest.read_bytes()
    newest.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert train.main(["--resume", str(stopped)]) == 0
    line, = (x for x in capsys.readouterr().out.splitlines() if "is damaged (" in x)
    assert newest.name in line and f"going on from {older}, after step 2" in line
    assert_same(stopped, undisturbed)


def test_rows_after_the_state_are_cut_off(stopped, undisturbed):
    """A power cut between the row and the state, inside a row, or while a state was written."""
    with open(stopped / "log.jsonl", "a") as log, open(stopped / "samples.jsonl", "a") as samples:
        log.write(json.dumps({"step": 4}) + '\n{"step": 5, "str')
        samples.write('{"step"')
    (stopped / "state-0.safetensors.tmp123").write_bytes(b"half a st")
    assert train.main(["--resume", str(stopped)]) == 0
    assert_same(stopped, undisturbed)


METHODS = ["--method lora-xs --rank 3", "--method lora --rank 2 --kl 0.01 --reward lenient",
           "--method full --lr 1e-4 --save-every 2 --reward lenient",
           "--algo sft --method lora --v-dtype bf16", "--engine plain --agreement",
           "--algo es --prompts 4 --group 4 --sigma 0.2"]


@pytest.mark.parametrize("flags", METHODS)
def test_every_method_resumes(flags, tmp_path, monkeypatch):
    """A state of v alone; tensors in another order; a step between two states of --save-every."""
    run = ["--steps", "3", "--prompts", "4", "--max-new-tokens", "16", "--eval-count", "2",
           "--eval-every", "0", "--seed", "3", *flags.split()]
    assert train.main([*run, "--out", str(tmp_path / "a")]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train.main([*run, "--out", str(tmp_path / "b")]) == 130
    assert train.main(["--resume", str(tmp_path / "b")]) == 0
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("call,words", [(2, "starting over"), (5, "after step 5")])
def test_stopped_in_an_evaluation(call, words, tmp_path, undisturbed, monkeypatch, capsys):
    """In the first one: there is no state, so the run starts over. In the last: it is trained
    already and must not be trained again."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, call, train, "evaluate")
        assert train.main([*RUN, "--out", str(out)]) == 130
    assert f"--resume {out}" in capsys.readouterr().err
    assert train.main(["--resume", str(out)]) == 0
    assert words in capsys.readouterr().out
    assert_same(out, undisturbed)


def test_a_finished_run_is_extended(tmp_path, undisturbed, capsys):
    """--steps M with --resume: with the optimizer's moments, as if it had been M from the start
    (the warm-up, a share of all steps, is over by then)."""
    out = tmp_path / "run"
    assert train.main([*RUN, "--steps", "3", "--out", str(out)]) == 0
    assert train.main(["--resume", str(out), "--steps", "2"]) == 2
    one_error(capsys, "--steps 2")
    assert train.main(["--resume", str(out), "--steps", "5"]) == 0
    a = load_file(out / "adapter.safetensors")["v"]
    assert torch.equal(a, load_file(undisturbed / "adapter.safetensors")["v"])
    assert [row["step"] for row in read_rows(out / "log.jsonl")] == [1, 2, 3, 4, 5]


WRONG = {  # changes to config.json before --resume
    "other problems": {"problems": "x"}, "another model": {"trained": {"base": "x"}},
    "another template": {"chat_format": "x"}, "no number": {"steps": "many"},
    "prompts that do not divide": {"prompts": 3}, "an evaluation": {"eval_only": True},
    "no model": {"model": "nowhere"}, "an unknown value": {"algo": "dpo"}}


@pytest.mark.parametrize("name", WRONG)
def test_a_run_under_other_settings_is_refused(name, stopped, capsys):
    """Going on with other data or another model under the old name."""
    path = stopped / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | WRONG[name]))
    assert train.main(["--resume", str(stopped)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


def test_a_run_of_a_task_that_was_edited_is_refused(tmp_path, capsys):
    """Its scores before and after would be of two tasks."""
    task = tmp_path / "task.py"
    task.write_text((ROOT / "gsm8k.py").read_text())
    out = tmp_path / "run"
    words = ["--task", str(task), "--params", "4", "--steps", "0", "--eval-count", "2"]
    assert train.main([*words, "--max-new-tokens", "4", "--out", str(out)]) == 0
    with open(task, "a") as file:
        file.write("# changed\n")
    assert train.main(["--resume", str(out), "--steps", "1"]) == 2
    one_error(capsys, f"the task in {task} changed")


def test_resume_asked_for_wrongly(stopped, tmp_path, capsys):
    """Two processes in one folder; no run at all; other flags beside --resume."""
    with resume.alone(stopped):
        assert train.main(["--resume", str(stopped)]) == 2
    one_error(capsys, "another process")
    for flags in (["--resume", str(tmp_path / "none")], ["--resume", str(stopped), "--lr=1"],
                  ["--resume", str(stopped), "--out", str(tmp_path / "new")]):
        assert train.main(flags) == 2
        one_error(capsys)


def test_a_second_process_leaves_the_folder_alone(tmp_path, capsys):
    """Refused because of the first one's lock, yet its config.json was in the folder by then."""
    out = tmp_path / "run"
    out.mkdir()
    with resume.alone(out):
        assert train.main([*RUN, "--out", str(out)]) == 2
    one_error(capsys, "another process")
    assert not list(out.iterdir())


def test_a_full_disk_keeps_the_last_good_state(stopped, undisturbed, monkeypatch, capsys):
    """A new state written over the only good one, and the disk fills meanwhile."""
    kept = {name: (stopped / name).read_bytes() for name in resume.FILES}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"as much as there was room for")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", full)
        assert train.main(["--resume", str(stopped)]) == 2
    one_error(capsys, "No space left")
    assert {name: (stopped / name).read_bytes() for name in resume.FILES} == kept
    assert not list(stopped.glob("*.tmp*"))
    assert train.main(["--resume", str(stopped)]) == 0
    assert_same(stopped, undisturbed)


def many_kills(count, folder):
    process = start(*RUN, "--out", folder / "whole")
    process.communicate()
    for i in range(count):
        out = folder / str(i)
        found = kill(out)
        output, errors = start("--resume", out).communicate(timeout=300)
        assert not errors.strip(), errors
        assert_same(out, folder / "whole")
        ways = ("starting over", "after step", "is finished")
        said = next(line for line in output.splitlines() if any(way in line for way in ways))
        said = said.replace(str(out), "").split(", ")[-1]
        print(f"kill {i + 1:2d}: {found}; {said}; equal", flush=True)
    print(f"{count} kills, each resumed, each bit-equal to the undisturbed run")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        many_kills(int(sys.argv[1]), Path(folder))
