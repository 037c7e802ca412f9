"""train.py: that each flag reaches the run, what a run writes, and mistakes on the command line."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import ASSETS, ROOT, TINY_RUN, TOY, needs_assets, one_error, read_rows

import train
from support import resume
from support.flags import PROGRAM


def parsed(*flags):
    return train.flags(["--out", "unused", *flags])


# ------------------------------------------------------------------------------------------ runs

def test_a_short_run_writes_everything(tmp_path, capsys):
    """Files, one log row a step, samples; the printed command gives the run's own final scores
    again (bug 24: fixed problems, fixed noise); a run is never written over."""
    out = tmp_path / "run"
    flags = ["--params", "13", *TINY_RUN, "--seed", "5", "--eval-every", "1", "--v-dtype", "bf16"]
    assert train.main([*flags, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    log = read_rows(out / "log.jsonl")
    assert summary["params"] == 13 and summary["adapter_bytes"] == 26
    assert summary["eval_count"] == 8 and summary["steps"] == 2 == len(log)
    keys = {f"{when}_{name}" for when in ("base", "final")
            for name in ("strict", "lenient", "format", "sampled", "sampled_format")}
    assert keys | {"tokens", "seconds", "seed", "model", "data"} <= set(summary)
    assert summary["tokens"] == sum(row["tokens"] for row in log)
    assert log[0]["gap"] < 1e-5 and "eval_strict" in log[0] and "eval_strict" not in log[1]
    assert [row["lr"] for row in log] == [0.00557, 0.00557]
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == 5 and config["v_dtype"] == "bf16"
    sample = read_rows(out / "samples.jsonl")[0]
    assert sample["prompt"].endswith("<|im_start|>assistant\n") and sample["response"]
    assert "13 trainable numbers, 26 bytes" in text and "+-" in text

    command = shlex.split(text.split("next: python train.py ")[1])
    assert train.main([*command, "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    for name in ("strict", "lenient", "format", "sampled"):
        assert again[name] == summary[f"final_{name}"]
    capsys.readouterr()
    assert train.main([*flags, "--out", str(out)]) == 2
    one_error(capsys, "holds a run already")


def test_flags_reach_the_run(tmp_path):
    """A flag that is parsed and then forgotten; then training goes on from the adapter it made."""
    flags = ("--params 14 --tie structured --kl 0.01 --recompute --reward lenient --lr 0.05 "
             "--minibatches 2 --rollout-rows 8 --tokens-per-micro-batch 500 --samples 2").split()
    out = tmp_path / "a"
    assert train.main([*TINY_RUN, *flags, "--system", "Be brief.", "--out", str(out)]) == 0
    log = read_rows(out / "log.jsonl")
    assert log[0]["kl"] < log[1]["kl"] < 1 and log[1]["kl"] > 1e-6
    trained = json.loads((out / "config.json").read_text())["trained"]
    assert trained["tie"] == "structured" and trained["groups"] == 14
    samples = read_rows(out / "samples.jsonl")
    assert len(samples) == 2 * 4 + 2  # two evaluations, greedy and sampled; a step's rollouts
    for sample in samples:
        assert sample["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    v = load_file(out / "adapter.safetensors")["v"]
    assert v.numel() == 14 and v.any()

    adapter = ["--adapter", str(out / "adapter.safetensors")]
    run = ["--steps", "0", *TINY_RUN[2:]]
    assert train.main([*run, *adapter, "--out", str(tmp_path / "b")]) == 0
    assert torch.equal(load_file(tmp_path / "b" / "adapter.safetensors")["v"], v)
    assert train.main([*run, *adapter, "--rank", "3", "--out", str(tmp_path / "c")]) == 2


def test_cutting_a_batch_changes_nothing(tmp_path):
    """--rollout-rows and --tokens-per-micro-batch bound the memory, not what is learned."""
    learned = []
    for name, flags in (("a", "--rollout-rows 256"),
                        ("b", "--rollout-rows 5 --tokens-per-micro-batch 300")):
        out = tmp_path / name
        assert train.main([*TINY_RUN, "--reward", "format", *flags.split(), "--out", str(out)]) == 0
        learned.append(load_file(out / "adapter.safetensors")["v"])
    assert learned[0].any()
    torch.testing.assert_close(*learned, atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_same_seed_same_run(engine, tmp_path):
    """Two runs with one seed agree to the last bit; another seed gives another run."""
    learned = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        flags = ["--seed", seed, "--engine", engine, "--out", str(tmp_path / name)]
        assert train.main([*TINY_RUN, "--eval-count", "1", *flags]) == 0
        learned.append((tmp_path / name / "adapter.safetensors").read_bytes())
    assert learned[0] == learned[1] != learned[2]


@needs_assets
def test_one_file_is_enough_to_evaluate(tmp_path):
    """--data FILE with --eval-only: gold answers that are read, prompts within the table."""
    data = ["--data", str(ASSETS / "gsm8k" / "test.jsonl"), "--max-new-tokens", "4"]
    out = ["--eval-only", "--eval-count", "2", "--out", str(tmp_path / "run")]
    assert train.main([*data, *out]) == 0


# ----------------------------------------------------------------------------------------- flags

def test_model_folder_defaults_and_their_limits(tmp_path, capsys):
    """tinylora.json of a model folder sets flags; the command line wins; outputs, unknown flags,
    values of another kind and data outside the folder are refused."""
    folder = shutil.copytree(TOY, tmp_path / "m")
    brought = {"steps": 7, "lr": 0.5, "data": ".", "max-new-tokens": 33}
    (folder / "tinylora.json").write_text(json.dumps(brought))
    args = parsed("--model", str(folder), "--lr", "0.25")
    assert (args.steps, args.lr, args.max_new_tokens, args.group) == (7, 0.25, 33, 4)
    assert Path(args.data).resolve() == folder
    for wrong in ({"out": "/tmp/x"}, {"no-such-flag": 1}, {"steps": "many"}, {"tie": "knotted"},
                  {"lr": [1]}, {"task": "x.py"}, {"data": "/etc/passwd"}, {"system": "\x1b[31m\n"}):
        (folder / "tinylora.json").write_text(json.dumps(wrong))
        code = train.main(["--model", str(folder), "--steps", "x", "--out", str(tmp_path / "o")])
        assert code == 2
        one_error(capsys)


def test_help(monkeypatch, capsys):
    """On a terminal of 80 columns: every flag with its text, beginning on its line or the next
    one, and its default; no line of it is wider."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = capsys.readouterr().out
    flags = text[text.index("options:"):]
    assert end.value.code == 0 and max(map(len, flags.splitlines())) <= 80
    assert len(text.splitlines()) <= 96  # two screens
    shown = re.findall(r"^  --(\S+)[^\n]*?(?:  |\n {24})(?=\S)", text, re.MULTILINE)
    assert sorted(shown) == sorted(name.replace("_", "-") for name in vars(parsed()))
    flat = "".join(text.split())  # argparse breaks lines at hyphens too
    for name, default, kind, meaning in (*train.RECIPE, *PROGRAM):
        said = "".join(meaning.partition(" (")[0].split())
        if default is not None and kind is not bool:
            said += f"({default}"
        assert said in flat, name


SILLY = """--params 0 | --params 1e3 | --params -1 | --params 9223372036854775807 | --group 1
--group 1099511627776 | --steps x | --steps -1 | --lr 0 | --lr nan | --temperature 0 | --kl -1
--seed -1 | --seed 4294967296 | --u 3 | --params 13 --u 2 | --tie structured | --rank 999
--max-new-tokens 4611686018427387904 | --prompts 5 --minibatches 2 | --eval-count 0 | --nonsense
--device mps | --device abacus | --device cpu:1 | --cuda-graph | --out /proc/nowhere
--model nowhere | --model no-such-owner/no-such-model | --model /etc/passwd | --data nowhere
--adapter nowhere.safetensors | --adapter toy | --adapter toy/model.safetensors | --task nowhere
--data toy/test.jsonl | --method lora --params 13 | --method full --rank 2 | --alpha 3
--method full --dtype bf16 | --method full --v-dtype bf16 | --method lora --rank 999 | --algo dpo
--method lora --adapter results/toy-seed0/adapter.safetensors | --algo es --group 3 | --sigma 1
--algo es --method lora | --algo es --kl 0.1 | --algo es --minibatches 2 | --algo sft --kl 0.1
--algo es --engine plain | --algo sft --reward lenient | --reward nonsense | --eval-only --steps 3
--eval-only --chat | --engine nonsense | --resume nowhere
--algo=-- | --system=-- | --lr=-- | --max-new-tokens 1048576 | --group 1048576
--params 200000 --u 200000 --rank 16"""


@pytest.mark.parametrize("flags", [x.strip() for x in re.split("[|\n]", SILLY)])
def test_silly_flags_end_in_one_line(flags, tmp_path, capsys, monkeypatch):
    """Exit code 2 and one line; never a traceback, a page of usage or a flag that does nothing."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(flags)
    if words[0] != "--resume":
        words += ["--out", str(tmp_path / "out")] * ("--out" not in words)
        words += ["--eval-count", "2"] * ("--eval-count" not in words)
    assert train.main(words) == 2
    one_error(capsys)
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_bytes_that_are_no_text(tmp_path):
    """A UnicodeEncodeError long after the start."""
    runs = []
    for name in ("system", "out", "instruction"):
        out = [] if name == "out" else ["--out", str(tmp_path / "out")]
        command = [sys.executable, "train.py", "--eval-only", f"--{name}", b"\xff\xfe", *out]
        runs.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE))
    for process in runs:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2 and errors.startswith(b"error: ")
        assert errors.count(b"\n") == 1


def test_a_model_folders_shape_is_not_an_adapters(tmp_path, capsys):
    """tinylora.json's rank is for new adapters: one that was made with another is used as it is."""
    folder = tmp_path / "model"
    shutil.copytree(TOY, folder)
    for rank in (3, 2):
        settings = json.loads((TOY / "tinylora.json").read_text()) | {"rank": rank, "params": 7}
        (folder / "tinylora.json").write_text(json.dumps(settings))
        out = tmp_path / str(rank)
        small = ["--steps", "0", "--max-new-tokens", "8", "--eval-count", "1"]
        assert train.main(["--model", str(folder), *small, "--out", str(out)]) == 0
        assert f"SVD: 28 matrices, rank {rank}" in capsys.readouterr().out
    adapter = str(tmp_path / "3" / "adapter.safetensors")
    words = ["--model", str(folder), "--adapter", adapter, "--eval-only", "--eval-count", "1"]
    assert train.main([*words, "--out", str(tmp_path / "again")]) == 0
    assert "SVD: 28 matrices, rank 3" in capsys.readouterr().out
    assert train.main([*words, "--rank", "2"]) == 2
    one_error(capsys, "--rank means nothing to --eval-only")


def test_the_old_command_says_where_it_went():
    """python tinylora.py show|export was the landed way."""
    done = subprocess.run([sys.executable, "tinylora.py", "show", "x"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode and done.stderr.count("\n") == 1 and "tools.export" in done.stderr


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_kl_alone_does_not_move_v_from_the_reference(engine, tmp_path):
    """Without a signal the KL to the policy itself is 0, and so is its gradient: exactly, because
    Adam makes a whole step of any rounding noise."""
    flags = ["--kl", "0.01", "--minibatches", "2", "--max-new-tokens", "4", "--steps", "2"]
    flags += ["--prompts", "6", "--group", "3", "--eval-count", "2", "--engine", engine]
    flags += ["--tokens-per-micro-batch", "300"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    rows = read_rows(tmp_path / "run" / "log.jsonl")
    assert [(row["signal"], row["v_norm"], row["kl"]) for row in rows] == [(0, 0, 0)] * 2


def test_more_steps_leave_the_warm_up_as_it_was(tmp_path):
    """The warm-up is a share of all updates: with more steps the rate would fall and rise again."""
    flags = ["--steps", "20", "--warmup", "0.5", "--prompts", "4", "--minibatches", "2"]
    before = train.flags([*flags, "--lr", "0.1", "--out", str(tmp_path / "run")])
    settings = {name: x for name, x in vars(before).items() if name != "resume"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    after = train.flags(["--resume", str(tmp_path / "run"), "--steps", "200"])
    assert after.steps == 200
    for update in range(40):
        rate = train.learning_rate(update, before)
        assert train.learning_rate(update, after) == pytest.approx(rate), update


def test_a_run_says_how_long_it_took_and_on_how_many_threads(tmp_path, monkeypatch):
    """The last evaluation was left out of the seconds; config.json named torch's threads as they
    were before a small model got one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    out = tmp_path / "run"
    torch.set_num_threads(2)
    assert train.main([*TINY_RUN, "--steps", "1", "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["threads"] == 1
    states = [resume.read(out / name, out)[0] for name in resume.FILES]
    last = max(states, key=lambda state: state["step"])["seconds"]
    assert json.loads((out / "summary.json").read_text())["seconds"] > last
