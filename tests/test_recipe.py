"""The training loop against a second one, written in plain Python (recipe.py).

The paper's defaults are literals here. tests/mutants.py breaks the program one line at a time, and
for every such break a test of this file must fail.
"""
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import mutants
import train
from helpers import ROOT
from recipe import BASE, SCORES, SETTINGS, TASK, TOY, Recipe, command, rows, write_adapter
from support import ranks

CLOCKS = ("seconds", "rollout_seconds", "tokens_per_s", "memory_gb")
EXACT = ("step", "tokens", *SCORES, "signal", *(f"eval_{name}" for name in SCORES))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five problems to train on, four others to evaluate on, and the task."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 5), ("test", 4)):
        lines = (TOY / f"{split}.jsonl").read_text().splitlines()[:count]
        questions = [json.loads(line)["question"] for line in lines]
        made = [json.dumps({"question": q, "n": n}) + "\n" for n, q in enumerate(questions)]
        (folder / f"{split}.jsonl").write_text("".join(made))
    (folder / "task.py").write_text(TASK)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy without tinylora.json, so that train.py's defaults count."""
    leave_out = shutil.ignore_patterns("tinylora.json", "*.jsonl")
    return shutil.copytree(TOY, tmp_path_factory.mktemp("model") / "toy", ignore=leave_out)


@pytest.fixture(scope="module")
def wanted(data, toy, tmp_path_factory):
    """A name of SETTINGS -> (adapter or None, evaluation before, log, evaluation after, v)."""
    @functools.cache
    def compute(name):
        adapter = None
        v0 = None
        if name == "kl":
            adapter = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
            v0 = write_adapter(adapter, 0)
        recipe = Recipe(data, toy, SETTINGS[name], v0)
        before = recipe.evaluate()
        assert before != recipe.evaluate(recipe.train)  # or the wrong problems would not be seen
        log = recipe.train_steps(3 * 5 // 4)
        if name == "kl":
            assert min(recipe.clipped.values()) > 0 and log[0]["kl"] > 0  # or nothing is tested
        return adapter, before, log, recipe.evaluate(), recipe.v.detach().flatten()
    return compute


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_the_recipe(name, engine, wanted, data, toy, tmp_path):
    """Every number of the log, v, and the evaluations' texts; --steps is not given: 3 epochs."""
    adapter, before, log, after, v = wanted(name)
    flags = BASE | SETTINGS[name] | {"engine": engine}
    if adapter:
        flags["adapter"] = adapter
    out = tmp_path / "run"
    assert train.main(command(data, toy, out, **flags)) == 0
    got = rows(out / "log.jsonl")
    assert len(got) == len(log) == 3
    for row, want in zip(got, log):
        for key, x in want.items():
            tolerance = 1e-9 if key in EXACT else 1e-3
            assert row[key] == pytest.approx(x, rel=tolerance, abs=1e-5), (row["step"], key)
        assert row["gap"] < 1e-5
    learned = load_file(out / "adapter.safetensors")["v"].float()
    torch.testing.assert_close(learned, v, rtol=0, atol=1e-4)  # lr is 0.1

    samples = [(s["step"], s["sampled"], s["response"]) for s in rows(out / "samples.jsonl")
               if "sampled" in s]
    for step, evaluations in ((0, before), (3, after)):
        for sampled, (_, texts) in zip((False, True), evaluations):
            assert [x for *at, x in samples if at == [step, sampled]] == texts
    summary = json.loads((out / "summary.json").read_text())
    for when, ((greedy, _), (sampled, _)) in (("base", before), ("final", after)):
        assert [summary[f"{when}_{s}"] for s in SCORES] == [greedy[s] for s in SCORES]
        for s in SCORES[1:]:
            assert summary[f"{when}_sampled_{s}"] == sampled[s]


def test_the_defaults_are_the_papers(data, toy, tmp_path, monkeypatch):
    """What is not said on the command line: in config.json, and in what the optimizer is given."""
    settings = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kw):
        settings.append({k: x for k, x in self.param_groups[0].items() if k != "params"})
        return step(self, *args, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    out = tmp_path / "run"
    flags = {"steps": 2, "max_new_tokens": 8, "eval_count": 1}
    assert train.main(command(data, toy, out, **flags)) == 0
    config = json.loads((out / "config.json").read_text())
    defaults = {"method": "tinylora", "algo": "grpo", "prompts": 64, "group": 4, "minibatches": 2,
                "lr": 1.6e-4, "warmup": 0.05, "temperature": 1.0, "clip_low": 0.2, "clip_high": 0.4,
                "kl": 0.0, "grad_clip": 1.0, "v_dtype": "fp32", "seed": 0, "reward": "even",
                "eval_every": 0, "save_every": 1, "sigma": 0.2}
    assert {name: config[name] for name in defaults} == defaults
    assert config["trained"]["rank"] == 2 and config["trained"]["groups"] == 13
    log = rows(out / "log.jsonl")
    assert [round(row["tokens"] / row["length"]) for row in log] == [64 * 4] * 2
    assert len(settings) == 2 * 2
    for group in settings:
        assert group["lr"] == 1.6e-4  # 5% of 4 updates: the first has the full rate
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
        assert group["weight_decay"] == 0 and not group["amsgrad"] and not group["maximize"]


@pytest.mark.parametrize("method,lr", [("lora", 2e-5), ("lora-xs", 1.6e-4), ("full", 1e-6)])
def test_each_methods_default_learning_rate(method, lr, data, toy, tmp_path):
    flags = {"method": method, "steps": 0, "max_new_tokens": 2, "eval_count": 1}
    assert train.main(command(data, toy, tmp_path / "run", **flags)) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == lr


def test_the_default_limit_is_1024_tokens(data, toy, tmp_path):
    flags = {"steps": 0, "eval_count": 1}
    assert train.main(command(data, toy, tmp_path / "run", **flags)) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_new_tokens"] == 1024


def test_noise_of_a_search_never_repeats(data, toy, tmp_path, monkeypatch):
    """--algo es: each pair has its direction and its noise; no two share a stream."""
    keys = []
    stream = np.random.RandomState

    def spy(key):
        keys.append(tuple(key) if isinstance(key, (list, tuple)) else (key,))
        return stream(key)
    monkeypatch.setattr(np.random, "RandomState", spy)
    flags = {"algo": "es", "prompts": 4, "group": 4, "steps": 2, "seed": 3, "max_new_tokens": 12}
    assert train.main(command(data, toy, tmp_path / "run", **flags)) == 0
    pairs = [(p, k) for p in range(2 * 4) for k in range(2)]  # positions in the epochs, pairs
    assert sorted(key for key in keys if key[0] == 6) == [(6, 3, p, k) for p, k in pairs]
    noise = sorted(key for key in keys if key[0] == 3)
    assert noise == sorted([(3, 3, p, k) for p, k in pairs] * 2)  # the two of a pair share theirs


def state_steps(out):
    """The step of each state file there is."""
    steps = []
    for path in sorted(out.glob("state-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            steps.append(json.loads(file.metadata()["done"])["step"])
    return steps


def test_the_last_state_is_saved(data, toy, tmp_path):
    """--save-every 2 of 3 steps: without the third, --steps more would repeat it."""
    flags = BASE | {"save_every": 2, "steps": 3}
    assert train.main(command(data, toy, tmp_path / "run", **flags)) == 0
    assert sorted(state_steps(tmp_path / "run")) == [2, 3]


def test_log_rows_are_on_the_disk_before_their_state(data, toy, tmp_path, monkeypatch):
    """A power cut must not leave a state whose log rows are lost: fsync of the logs comes first."""
    out = tmp_path / "run"
    logs = ("log.jsonl", "samples.jsonl")
    synced = {}
    states = []
    fsync = os.fsync
    rename = os.replace

    def spy_sync(descriptor):
        inode = os.fstat(descriptor)
        for name in logs:
            if (out / name).exists() and os.path.samestat(inode, os.stat(out / name)):
                synced[name] = inode.st_size
        fsync(descriptor)

    def spy_replace(self, target):
        if "state-" in str(target):
            with safe_open(self, framework="pt") as file:
                done = json.loads(file.metadata()["done"])
            states.append(done["step"])
            for name in logs:
                assert synced.get(name, 0) == done[name], (name, done["step"])
        return rename(self, target)
    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    assert train.main(command(data, toy, out, **BASE | {"steps": 2})) == 0
    assert states == [0, 1, 2] and synced["log.jsonl"] > 0


def stop_in_update(monkeypatch, number):
    """Ctrl-C in the middle of the update of that number."""
    calls = []
    step = torch.optim.AdamW.step

    def stopping(self, *args, **kw):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(self, *args, **kw)
    monkeypatch.setattr(torch.optim.AdamW, "step", stopping)


@pytest.mark.parametrize("start", ["base", "adapter", "lora"])
def test_a_resumed_run_holds_on_to_the_first_policy(start, data, toy, tmp_path, monkeypatch):
    """The KL's reference taken from the resumed policy, or from an adapter that has changed."""
    flags = BASE | SETTINGS["kl"] | {"reward": "even"}
    adapter = tmp_path / "adapter.safetensors"
    first = write_adapter(adapter, 0)
    if start == "adapter":
        flags["adapter"] = adapter
    elif start == "lora":
        flags |= {"method": "lora", "lr": 1e-3}
    assert train.main(command(data, toy, tmp_path / "whole", **flags)) == 0
    with monkeypatch.context() as patch:
        stop_in_update(patch, 6)
        assert train.main(command(data, toy, tmp_path / "part", **flags)) == 130
    assert len(rows(tmp_path / "part" / "log.jsonl")) == 2
    write_adapter(adapter, 1)
    assert train.main(["--resume", str(tmp_path / "part")]) == 0
    states = [load_file(tmp_path / name / "state-1.safetensors") for name in ("whole", "part")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    if start != "lora":
        reference = first if start == "adapter" else torch.zeros(13, 1)
        assert torch.equal(states[1]["reference.0"], reference)
        assert not torch.equal(states[1]["param.0"], reference)
    logs = [[{k: x for k, x in row.items() if k not in CLOCKS}
             for row in rows(tmp_path / name / "log.jsonl")] for name in ("whole", "part")]
    assert logs[0] == logs[1] and logs[0][2]["kl"] > 1e-4


def stand_in(monkeypatch, factor):
    """A second rank, whose numbers are those of this one times a factor."""
    def everyone(values):
        is_number = len(values) == 1 and isinstance(values[0], (int, float))
        return [*values, values[0] * factor] if is_number else values
    monkeypatch.setattr(ranks, "everyone", everyone)


@pytest.mark.parametrize("factor,agree", [(1, True), (1 + 1e-9, True), (1.001, False), (2, False)])
def test_ranks_that_differ_end_the_run(factor, agree, data, toy, tmp_path, monkeypatch, capsys):
    """In v after a step; rounding is no difference."""
    stand_in(monkeypatch, factor)
    argv = command(data, toy, tmp_path / "run", **BASE | {"steps": 2})
    assert train.main(argv) == (0 if agree else 2)
    words = "error: the ranks differ in what they have learned after step 1"
    assert (words in capsys.readouterr().err) != agree


def test_ranks_that_resume_from_different_steps_end(data, toy, tmp_path, monkeypatch, capsys):
    """One has the state of step 1, the other (another disk) that of step 2."""
    flags = BASE | {"steps": 2}
    with monkeypatch.context() as patch:
        stop_in_update(patch, 4)
        assert train.main(command(data, toy, tmp_path / "run", **flags)) == 130
    stand_in(monkeypatch, 2)
    assert train.main(["--resume", str(tmp_path / "run")]) == 2
    assert "error: the ranks differ in the step they go on from" in capsys.readouterr().err


def test_the_mutants_are_of_the_present_code():
    """tests/mutants.py, which is run by hand, changes lines that are there once."""
    for what, file, old, _, _ in mutants.MUTANTS:
        assert (ROOT / file).read_text().count(old) == 1, what
