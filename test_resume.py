"""A run that is stopped goes on as if nothing had happened, and N processes do what one does. Bugs guarded are in the docstrings.

    python -m pytest -q test_resume.py      three kills, two ranks
    python test_resume.py 20                twenty kills at random moments, each compared with the run nobody disturbed
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # the tests are the CPU's; before the imports

import pytest
import torch
from safetensors.torch import load_file

import grpo
import lora
import state
import train

ROOT = Path(__file__).resolve().parent
TOY = str(ROOT / "toy")
RUN = ["--model", TOY, "--steps", "5", "--prompts", "4", "--group", "2", "--minibatches", "2", "--kl", "0.01", "--reward", "lenient", "--max-new-tokens", "16",
       "--eval-count", "4", "--eval-every", "2", "--seed", "3"]
CLOCK = {"seconds", "rollout_seconds", "tokens_per_s", "memory_gb"}  # what may differ in log rows and summary


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(out):
    """All that a run leaves behind, but for the time it took; and nothing of a broken write."""
    assert not list(out.glob("*.tmp*"))
    learned = {str(path.relative_to(out)): load_file(path) for path in sorted(out.rglob("*.safetensors")) if not path.name.startswith("state-")}
    done, tensors = max((state.read(out / name, out) for name in state.FILES), key=lambda pair: pair[0]["step"])
    logs = [[{k: x for k, x in row.items() if k not in CLOCK} for row in rows(out / name)] for name in ("log.jsonl", "samples.jsonl")]
    summary = {k: x for k, x in json.loads((out / "summary.json").read_text()).items() if k not in CLOCK}
    return learned | {"state": tensors}, (done["step"], done["tokens"], done["base"], *logs, summary)


def same(a, b):
    """Bit for bit."""
    (tensors, facts), (others, more) = record(a), record(b)
    assert facts == more
    assert tensors.keys() == others.keys()
    for file in tensors:
        assert tensors[file].keys() == others[file].keys()
        for name, x in tensors[file].items():
            assert torch.equal(x, others[file][name]), f"{file}: {name}"


def launch(*command, **kw):
    return subprocess.Popen([sys.executable, "-u", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **kw)


def start(*flags):
    return launch("train.py", *flags)


def torchrun(n, *flags):
    return launch("-m", "torch.distributed.run", "--nproc_per_node", n, "--master_port", random.randint(20000, 40000), "train.py", *flags)


def wait_for(process, text, times=1):
    for line in process.stdout:
        times -= text in line
        if not times:
            return
    raise AssertionError(f"never said {text!r}: {process.stderr.read()}")


def stop_at(monkeypatch, n):
    """Ctrl-C in the middle of the n-th update from now on."""
    calls, update = [], grpo.optimizer_step

    def stopping(*args, **kw):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return update(*args, **kw)
    monkeypatch.setattr(grpo, "optimizer_step", stopping)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*RUN, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run interrupted in its fourth step, between the two updates."""
    out = tmp_path_factory.mktemp("part") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 8)
        assert train.main([*RUN, "--out", str(out)]) == 130
    return out


@pytest.fixture
def stopped(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def kill(out):
    """kill -9 at a random moment: a random line of the output, which has one for every stage, and up to a second on; tells what there was then."""
    process, line, more = start(*RUN, "--out", out), random.randint(1, 16), random.random() ** 2
    wait_for(process, "", line)
    while not (out / "config.json").exists():  # from here on there is a run to go on with
        time.sleep(0.001)
    time.sleep(more)
    process.kill()
    process.communicate()
    return f"{more:4.2f} s after line {line:2d}, {sum((out / name).exists() for name in state.FILES)} states, {state.size(out / 'log.jsonl'):4d} bytes of log"


def test_kill_9_at_random_moments(tmp_path, undisturbed):
    """Rows of steps done twice, half a row, Adam's moments or the base's evaluation lost, a state half written."""
    for i in range(int(os.environ.get("TINYLORA_KILLS", 3))):
        kill(tmp_path / str(i))
        assert train.main(["--resume", str(tmp_path / str(i))]) == 0
        same(tmp_path / str(i), undisturbed)


def test_ctrl_c_between_two_updates_then_resume(stopped, undisturbed, capsys):
    """The half step's Adam moments or v entering the resumed run; rows after the state; config.json changed by resuming."""
    config = (stopped / "config.json").read_text()
    assert len(rows(stopped / "log.jsonl")) == 3
    assert train.main(["--resume", str(stopped)]) == 0
    assert "after step 3" in capsys.readouterr().out
    same(stopped, undisturbed)
    assert (stopped / "config.json").read_text() == config
    assert train.main(["--resume", str(stopped)]) == 0  # a finished run is left alone
    assert "finished" in capsys.readouterr().out
    same(stopped, undisturbed)


DAMAGES = {"cut": lambda data: data[:-7], "empty": lambda data: b"", "one bit in the numbers": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
           "garbage": lambda data: bytes(len(data)), "one digit of the log's size": lambda data: data.replace(b'log.jsonl\\": ', b'log.jsonl\\":1', 1)}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_newest_state_falls_back_and_says_so(name, stopped, undisturbed, capsys):
    """A state trusted for its name or its header alone. Both damaged: one clear line, nothing touched."""
    newest, older = sorted((stopped / n for n in state.FILES), key=lambda path: -state.read(path, stopped)[0]["step"])
    newest.write_bytes(DAMAGES[name](newest.read_bytes()))
    copy = shutil.copytree(stopped, stopped.parent / "copy")
    if name in ("cut", "garbage"):
        assert train.main(["--resume", str(stopped)]) == 0
        line, = (x for x in capsys.readouterr().out.splitlines() if "is damaged (" in x)
        assert newest.name in line and f"going on from {older}, after step 2" in line
        same(stopped, undisturbed)
    (copy / newest.name).write_bytes(DAMAGES[name]((copy / older.name).read_bytes()))
    (copy / older.name).write_bytes(b"x")
    assert train.main(["--resume", str(copy)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and newest.name in message and older.name in message and len(rows(copy / "log.jsonl")) == 3


def test_half_a_row_and_rows_too_many_are_cut_off(stopped, undisturbed):
    """A power cut between the row and the state, or inside the row."""
    with open(stopped / "log.jsonl", "a") as log, open(stopped / "samples.jsonl", "a") as samples:
        log.write(json.dumps({"step": 4}) + '\n{"step": 5, "str')
        samples.write('{"step"')
    (stopped / "state-0.safetensors.tmp123").write_bytes(b"half a st")
    assert train.main(["--resume", str(stopped)]) == 0
    same(stopped, undisturbed)


def test_a_log_that_lost_rows_is_not_gone_on_with(stopped, capsys):
    """Rows that a state counts on and that are gone: the log would have a hole."""
    os.truncate(stopped / "log.jsonl", 100)
    assert train.main(["--resume", str(stopped)]) == 2
    assert "log.jsonl is shorter" in capsys.readouterr().err
    for name in state.FILES:
        (stopped / name).unlink()
    assert train.main(["--resume", str(stopped)]) == 2  # and not begun anew either, over the rows there are
    assert "no state" in capsys.readouterr().err and state.size(stopped / "log.jsonl") == 100


METHODS = ["--method lora-xs --rank 3", "--method lora --rank 2 --kl 0", "--method full --lr 1e-4 --save-every 2", "--algo sft --method lora --v-dtype bf16", "--algo sft"]


@pytest.mark.parametrize("flags", METHODS)
def test_every_method_resumes(flags, tmp_path, monkeypatch):
    """State kept for v alone; many tensors in another order; --save-every; what --kl holds on to taken from the trained policy."""
    run = [*RUN, "--steps", "3", "--eval-every", "0", "--eval-count", "2", *flags.split()]
    assert train.main([*run, "--out", str(tmp_path / "a")]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert train.main([*run, "--out", str(tmp_path / "b")]) == 130
    assert train.main(["--resume", str(tmp_path / "b")]) == 0
    same(tmp_path / "a", tmp_path / "b")


def test_what_kl_holds_on_to_is_restored(stopped, tmp_path):
    """The reference taken anew from a resumed policy, or from an adapter file that has changed since."""
    for name in state.FILES:
        done, tensors = state.read(stopped / name, stopped)
        assert torch.equal(tensors["reference.0"], torch.zeros(13, 1)) and (tensors["param.0"] != 0).any()


def test_stopped_in_an_evaluation(tmp_path, undisturbed, monkeypatch, capsys):
    """In the first: nothing to go on from, so it starts over. In the last: trained already, and not once more."""
    for call, words in ((2, "starting over"), (5, "after step 5")):
        out, calls, evaluate = tmp_path / words[:5], [], train.evaluate

        def stopping(*args):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return evaluate(*args)
        with monkeypatch.context() as patch:
            patch.setattr(train, "evaluate", stopping)
            assert train.main([*RUN, "--out", str(out)]) == 130
        assert f"--resume {out}" in capsys.readouterr().err
        assert train.main(["--resume", str(out)]) == 0
        assert words in capsys.readouterr().out
        same(out, undisturbed)


def test_sigterm_is_ctrl_c(tmp_path):
    """A cluster's way of stopping a job: exit 143, adapter and state kept, the command to go on with in the last line."""
    out = tmp_path / "run"
    process = start(*RUN, "--steps", "1000", "--eval-every", "0", "--out", out)
    wait_for(process, "step   2")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors and errors.strip().endswith(f"python train.py --resume {out}")
    assert (out / "adapter.safetensors").exists() and max(state.read(out / name, out)[0]["step"] for name in state.FILES) >= 2


def test_resume_asked_for_wrongly(stopped, tmp_path, capsys, monkeypatch):
    """Another run under the old name: other flags, other data or model; two processes in one folder; no run at all. One line each."""
    config = json.loads((stopped / "config.json").read_text())
    with state.alone(stopped):
        assert train.main(["--resume", str(stopped)]) == 2
    assert "another process" in capsys.readouterr().err
    for flags in (["--resume", str(tmp_path / "none")], ["--resume", str(stopped), "--steps", "9"], ["--resume", str(stopped), "--lr=1"]):
        assert train.main(flags) == 2
    for changes in ({"problems": "x"}, {"trained": {"base": "x"}}, {"steps": "many"}, {"prompts": 3}, {"eval_only": True}, {"model": "nowhere"}):
        (stopped / "config.json").write_text(json.dumps(config | changes))
        assert train.main(["--resume", str(stopped)]) == 2, changes
        message = capsys.readouterr().err
        assert message.strip().splitlines()[-1].startswith("error: "), message


def test_a_full_disk_keeps_the_last_good_state(stopped, undisturbed, monkeypatch, capsys):
    """The state written over the only good one; the disk fills between two states."""
    kept = {name: (stopped / name).read_bytes() for name in state.FILES}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"as much as there was room for")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        assert train.main(["--resume", str(stopped)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "No space left" in message
    assert {name: (stopped / name).read_bytes() for name in state.FILES} == kept and not list(stopped.glob("*.tmp*"))
    assert train.main(["--resume", str(stopped)]) == 0
    assert "after step 3" in capsys.readouterr().out
    same(stopped, undisturbed)


def test_two_ranks_do_what_one_does(tmp_path):
    """A denominator or a mean of each rank's own; another split of the mini-batches; rows written twice; evaluation counted once per rank."""
    run = [*RUN, "--steps", "3", "--lr", "0.001"]
    process = torchrun(2, *run, "--out", tmp_path / "two")
    assert train.main([*run, "--out", str(tmp_path / "one")]) == 0
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("step   1/3") == 1
    (tensors, facts), (others, more) = record(tmp_path / "one"), record(tmp_path / "two")
    assert (tensors["adapter.safetensors"]["v"] - others["adapter.safetensors"]["v"]).abs().max() < 1e-6
    assert facts[0] == more[0] == 3 and facts[4] == more[4] and len(facts[3]) == len(more[3]) == 3  # all samples, in order
    for a, b in zip([facts[2][0], *facts[3], facts[5]], [more[2][0], *more[3], more[5]]):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == b[name] or a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_a_dying_rank_ends_all_and_leaves_a_state(tmp_path):
    """The others waiting for it for ever; or ending without a word; or a run that only N ranks can go on with."""
    out = tmp_path / "run"
    process = torchrun(2, *RUN, "--out", out)
    wait_for(process, "step   2")
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
    children = sorted(int(pid) for pid, parent in map(str.split, table) if int(parent) == process.pid)
    began = time.time()
    os.kill(children[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 30
    assert f"torchrun --nproc_per_node 2 train.py --resume {out}" in errors
    assert train.main(["--resume", str(out)]) == 0
    assert len(rows(out / "log.jsonl")) == 5


def test_prompts_that_the_ranks_cannot_share(tmp_path, capsys, monkeypatch):
    """A remainder dropped in silence."""
    monkeypatch.setattr(train.ranks, "SIZE", 3)
    assert train.main([*RUN, "--out", str(tmp_path / "a")]) == 2
    assert "cannot be split" in capsys.readouterr().err


if __name__ == "__main__":
    kills, folder = int(sys.argv[1]), Path(tempfile.mkdtemp())
    whole = start(*RUN, "--out", folder / "whole")
    whole.communicate()
    for i in range(kills):
        out = folder / str(i)
        found, process = kill(out), start("--resume", out)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and not errors.strip(), errors
        same(out, folder / "whole")
        said = next(line for line in output.splitlines() if "starting over" in line or "after step" in line or "is finished" in line)
        print(f"kill {i + 1:2d}: {found}; {said.replace(str(out), '').split(', ')[-1]}; equal", flush=True)
    print(f"{kills} kills, each resumed, each bit-equal to the undisturbed run")
    shutil.rmtree(folder)
