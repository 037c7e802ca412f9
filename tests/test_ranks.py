"""torchrun: N processes do what one does, and one that ends does not leave the others waiting."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from helpers import ROOT, one_error, read_rows

import train
from support import ranks

RUN = ["--prompts", "4", "--group", "8", "--minibatches", "2", "--kl", "0.01", "--seed", "3",
       "--reward", "format", "--max-new-tokens", "16", "--eval-count", "5", "--eval-every", "2"]
CLOCKS = ("seconds", "tokens_per_s", "memory_gb")


def torchrun(n, *flags):
    port = random.randint(20000, 40000)
    command = [sys.executable, "-u", "-m", "torch.distributed.run", "--nproc_per_node", str(n),
               "--master_port", str(port), "train.py", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def assert_close(a, b):
    """Two rows or summaries: sums over two ranks are rounded in another order."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        if name not in CLOCKS:
            assert x == b[name] or x == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_two_ranks_do_what_one_does(tmp_path):
    """A denominator or a mean of each rank alone; mini-batches split otherwise; rows written
    twice; evaluation problems counted twice (5 do not divide by 2) or out of order."""
    run = [*RUN, "--steps", "3", "--lr", "0.001"]
    process = torchrun(2, *run, "--out", tmp_path / "two")
    assert train.main([*run, "--out", str(tmp_path / "one")]) == 0
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("step   1/3") == 1
    one = tmp_path / "one"
    two = tmp_path / "two"
    v, w = (load_file(out / "adapter.safetensors")["v"] for out in (one, two))
    assert v.any() and (v - w).abs().max() < 1e-6
    assert read_rows(one / "samples.jsonl") == read_rows(two / "samples.jsonl")
    rows = read_rows(one / "log.jsonl")
    assert len(rows) == 3
    for a, b in zip(rows, read_rows(two / "log.jsonl"), strict=True):
        assert_close(a, b)
    assert_close(*(json.loads((out / "summary.json").read_text()) for out in (one, two)))


def children_of(process):
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [line.split() for line in table.splitlines()]
    return sorted(int(pid) for pid, parent in pairs if int(parent) == process.pid)


def test_a_rank_that_dies_ends_all_and_leaves_a_state(tmp_path):
    """The other rank waiting for ever, or ending without a word; a run that only the same number
    of ranks could go on with."""
    out = tmp_path / "run"
    process = torchrun(2, *RUN, "--steps", "5", "--out", out)
    for line in process.stdout:
        if "step   2" in line:
            break
    began = time.time()
    os.kill(children_of(process)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 30
    assert f"torchrun --nproc_per_node 2 train.py --resume {out}" in errors
    assert train.main(["--resume", str(out)]) == 0
    assert len(read_rows(out / "log.jsonl")) == 5


def test_prompts_that_the_ranks_cannot_share(tmp_path, capsys, monkeypatch):
    """The remainder left out without a word."""
    monkeypatch.setattr(ranks, "SIZE", 3)
    assert train.main([*RUN, "--out", str(tmp_path / "a")]) == 2
    one_error(capsys, "cannot be split", "3 equal shares")
