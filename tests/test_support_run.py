"""python -m pytest -q tests/test_support_run.py

Resuming, reporting, ranks and exit codes, without a model. Docstrings name the bug.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # before the imports

import pytest
import torch
from safetensors.torch import save_file

from support import program, ranks, report, resume, scores
from support.errors import InputError
from support.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SCORES = ["strict", "lenient", "format"]


# ---- resume


def policy(seed):
    """Two trained tensors, their optimizer after a step, and a reference."""
    rng = torch.Generator().manual_seed(seed)
    params = [torch.randn(3, 2, generator=rng).requires_grad_(), torch.randn(4, generator=rng)]
    params = [p.detach().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng)
    optimizer.step()
    return params, optimizer, [torch.randn(p.shape, generator=rng) for p in params]


def tensors(params, optimizer, reference):
    kept = [*params, *reference]
    for i, state in sorted(optimizer.state_dict()["state"].items()):
        kept += [state[name] for name in ("exp_avg", "exp_avg_sq", "step")]
    return kept


@pytest.fixture
def stopped(tmp_path):
    """A run with two states, after steps 1 and 2, and a log that went on."""
    done = {"step": 0, "tokens": 0, "seconds": 0.5, "base": [], "slot": 1}
    for step in (1, 2):
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n' * step)
        resume.save(tmp_path, done | {"step": step, "slot": step % 2}, *policy(step))
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n' * 3 + '{"st')
    (tmp_path / "state-0.safetensors.tmp123").write_bytes(b"half a st")
    return tmp_path


def test_a_state_comes_back_bit_for_bit(stopped, capsys):
    """Adam's moments or the reference of --kl not restored; rows after the state kept."""
    there = policy(7)
    done = resume.load(stopped, *there)
    assert done["step"] == 2 and "going on from" in capsys.readouterr().out
    for x, y in zip(tensors(*there), tensors(*policy(2)), strict=True):
        assert torch.equal(x, y)
    assert (stopped / "log.jsonl").read_text() == '{"step": 1}\n' * 2
    assert not list(stopped.glob("*.tmp*"))


def test_the_format_of_the_state_file(tmp_path):
    """Written here by hand: what the first version wrote must load."""
    params, optimizer, reference = policy(1)
    names = {f"param.{i}": p.detach() for i, p in enumerate(params)}
    names |= {f"reference.{i}": p for i, p in enumerate(reference)}
    for i, state in optimizer.state_dict()["state"].items():
        names |= {f"{kind}.{i}": state[kind] for kind in ("exp_avg", "exp_avg_sq", "step")}
    text = '{"step": 4, "slot": 0, "log.jsonl": 0, "samples.jsonl": 0}'
    header = {"format": "tinylora state", "done": text, "sha256": resume.checksum(text, names)}
    save_file(names, tmp_path / "state-0.safetensors", header)
    there = policy(2)
    assert resume.load(tmp_path, *there)["step"] == 4
    for x, y in zip(tensors(*there), tensors(params, optimizer, reference), strict=True):
        assert torch.equal(x, y)


DAMAGES = {
    "cut": lambda data: data[:-7],
    "empty": lambda data: b"",
    "one bit in the numbers": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "garbage": lambda data: bytes(len(data)),
    "the log's size": lambda data: data.replace(b'log.jsonl\\": ', b'log.jsonl\\":1', 1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_state_falls_back_and_says_so(name, stopped, capsys):
    """A state trusted for its name or its header alone."""
    newest = max(stopped.glob("state-*.safetensors"),
                 key=lambda path: resume.read(path, stopped)[0]["step"])
    older, = set(stopped.glob("state-*.safetensors")) - {newest}
    newest.write_bytes(DAMAGES[name](newest.read_bytes()))
    copy = shutil.copytree(stopped, stopped / "copy")
    assert resume.load(stopped, *policy(7))["step"] == 1
    line, = capsys.readouterr().out.splitlines()
    assert newest.name in line and f"going on from {older}, after step 1" in line
    (copy / older.name).write_bytes(b"x")
    with pytest.raises(InputError, match="cannot go on") as error:
        resume.load(copy, *policy(7))
    assert newest.name in str(error.value) and older.name in str(error.value)
    assert (copy / "log.jsonl").read_text().endswith('{"st')  # nothing is touched


def test_a_log_that_lost_rows_is_not_gone_on_with(stopped):
    """Rows that a state counts on and that are gone: the log would have a hole."""
    os.truncate(stopped / "log.jsonl", 5)
    with pytest.raises(InputError, match="log.jsonl is shorter"):
        resume.load(stopped, *policy(7))
    for name in resume.FILES:
        (stopped / name).unlink()
    with pytest.raises(InputError, match="no state"):  # and not begun anew over the rows there are
        resume.load(stopped, *policy(7))
    os.truncate(stopped / "log.jsonl", 0)
    assert resume.load(stopped, *policy(7)) is None


def test_the_logs_reach_the_disk_before_the_state(stopped, monkeypatch):
    """A power cut that keeps the state and loses the rows it counts on."""
    events = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    (stopped / "samples.jsonl").write_text("{}\n")
    resume.save(stopped, {"step": 3, "slot": 0}, *policy(3))
    assert events[:2] == ["log.jsonl", "samples.jsonl"] and events[2].startswith("state-1.safe")


def test_one_process_at_a_time(tmp_path):
    """The lock is there before anything is in the folder, and ends with its process."""
    code = f"from support import resume\nwith resume.alone({str(tmp_path)!r}): print('free')"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with resume.alone(tmp_path):
        other = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert "another process is busy with this run" in other.stderr and not other.stdout
    assert "free" in subprocess.run(command, capture_output=True, text=True, env=environment).stdout


def test_what_a_run_depends_on_must_not_change(tmp_path, capsys):
    """Other problems, model or chat template under the old name; an older config.json."""
    settings = {"data": "D", "model": "M", "device": "cpu", "threads": 2, "problems": "a",
                "chat_format": "b", "trained": {"base": "c"}}
    write_json(tmp_path / "config.json", settings)
    assert resume.compare(settings, tmp_path) == settings and not capsys.readouterr().out
    resume.compare(settings | {"threads": 8}, tmp_path)
    assert "threads 2, now 8: what follows is equal up to" in capsys.readouterr().out
    for name, words in (("problems", "the problems in D changed"),
                        ("chat_format", "the chat template or tokenizer of M changed"),
                        ("trained", "M, or what --adapter brought, changed")):
        with pytest.raises(InputError, match=words):
            resume.compare(settings | {name: "x"}, tmp_path)
    write_json(tmp_path / "config.json", {"data": "D", "model": "M", "problems": "by the old code"})
    assert resume.compare(settings, tmp_path) == {"data": "D", "model": "M"}


def test_the_settings_of_a_run_stay(tmp_path):
    """config.json rewritten by --resume; more steps not written down; the fingerprint missing."""
    args = SimpleNamespace(data="D", model="M", resume=None, steps=5, warmup=0.05,
                           device="cpu", prompts=4)
    chat = SimpleNamespace(fingerprint=lambda: "f")
    model = SimpleNamespace(adapter={"rank": 2})

    def settings():
        return resume.complete(resume.begin(args, tmp_path, [[1]]), args, tmp_path, model, chat)
    settings()
    first = json.loads((tmp_path / "config.json").read_text())
    assert first["trained"] == {"rank": 2} and first["chat_format"] == "f" and "resume" not in first
    args.resume = str(tmp_path)
    assert settings() == first == json.loads((tmp_path / "config.json").read_text())
    args.steps = 9
    assert settings()["steps"] == json.loads((tmp_path / "config.json").read_text())["steps"] == 9
    chat.fingerprint = lambda: "g"
    with pytest.raises(InputError, match="chat template"):
        settings()
    write_json(tmp_path / "summary.json", {"steps": 5})
    assert resume.is_finished(tmp_path, 5) and not resume.is_finished(tmp_path, 9)


# ---- report


def result(*values):
    return dict(zip([*SCORES, "length"], values))


def test_the_lines_of_a_run(capsys):
    row = {"step": 3, "strict": 0.25, "lenient": 0.5, "format": 1.0, "signal": 0.469, "gap": None,
           "loss": 0.5, "length": 20.4, "lr": 0.05, "kl": 0.1}
    report.print_step(row, 50, SCORES)
    scores.print_evaluation("evaluation, greedy", result(0.5, 0.6, 1.0, 90.2), 100, 2.04, SCORES)
    report.print_settings({"model": "toy", "params": None, "resume": "x"})
    assert capsys.readouterr().out.splitlines() == [
        "step   3/50  strict 0.250  lenient 0.500  format 1.000  signal 0.47  loss 0.5000  "
        "length 20  lr 5.0e-02",
        "evaluation, greedy: strict 0.500 +- 0.050  lenient 0.600 +- 0.049  format 1.000 +- 0.000"
        "  (100 problems, 90 tokens each, 2.0 s)",
        "settings: model=toy"]


def test_any_names_of_scores():
    """A task has its own: the first takes the part of "strict"."""
    pair = [{"right": 0.1, "polite": 0.2}, {"right": 0.3, "polite": 0.4}]
    assert scores.summary_scores(pair, ["right", "polite"], "base_") == {
        "base_right": 0.1, "base_polite": 0.2, "base_sampled": 0.3, "base_sampled_polite": 0.4}
    swapped = [result(1, 2, 3), result(4, 5, 6)]
    assert scores.summary_scores(swapped, ["lenient", "strict"]) == {
        "lenient": 2, "strict": 1, "sampled_lenient": 5, "sampled": 4}
    assert scores.standard_error(1.5, 10) == 0.0  # a mean that is no share is not complex


def test_the_end_of_a_run(tmp_path, capsys):
    """The keys and their order as plots and committed results have them; the command works."""
    args = SimpleNamespace(out=str(tmp_path), steps=5, seed=0, method="tinylora", algo="grpo",
                           reward="strict", model="toy", data="my data", eval_data=None,
                           adapter=None, v_dtype="bf16", eval_count=None, max_new_tokens=24,
                           dtype="fp32", system=None)
    run = SimpleNamespace(args=args, score_names=SCORES)
    base = [result(0.1, 0.2, 0.3), result(0.4, 0.5, 0.6)]
    done = {"tokens": 1234, "seconds": 7.0, "base": base}
    report.write_summary(run, [torch.zeros(13, 1)], tmp_path / "adapter.safetensors", done,
                         [result(1, 1, 1), result(0, 0, 0)], 500)
    written = json.loads((tmp_path / "summary.json").read_text())
    committed = json.loads((ROOT / "results/toy-seed0/summary.json").read_text())
    assert list(written) == list(committed) and written["adapter_bytes"] == 26
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "500 held-out problems       before            after"
    assert lines[2] == "greedy, strict            0.100 +- 0.013    1.000 +- 0.000"
    assert lines[-2:] == [
        "13 trainable numbers, 26 bytes (bf16); 1,234 tokens sampled; 7 s in all",
        f"next: python train.py --eval-only --adapter {tmp_path}/adapter.safetensors --model toy "
        "--data 'my data' --max-new-tokens 24 --dtype fp32"]


def test_rows_go_to_wandb_when_asked(tmp_path, monkeypatch):
    """Without None; a missing package is one line; not imported unless asked."""
    got = []
    wandb = SimpleNamespace(init=lambda **kw: got.append(kw),
                            log=lambda row, step: got.append((row, step)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = SimpleNamespace(wandb="mine", out=str(tmp_path / "new"), lr=0.1)
    report.wandb_logger(args)({"step": 2, "loss": 1.0, "gap": None})
    assert got[0]["project"] == "mine" and got[1] == ({"step": 2, "loss": 1.0}, 2)
    monkeypatch.setitem(sys.modules, "wandb", None)
    report.wandb_logger(SimpleNamespace(wandb=None))({"step": 1})
    with pytest.raises(InputError, match="--wandb: "):
        report.wandb_logger(SimpleNamespace(wandb="mine", out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


# ---- ranks and program


def test_ranks_that_differ_are_an_error(monkeypatch):
    """Ranks that train different models unnoticed; rounding taken for a difference."""
    for others, fine in (([1.0, 1.0 + 1e-9], True), ([1.0, 1.1], False), ([3, 4], False)):
        monkeypatch.setattr(ranks, "everyone", lambda values, others=others: others)
        if fine:
            ranks.agree(1.0, "v")
        else:
            with pytest.raises(InputError, match="the ranks differ in v"):
                ranks.agree(1.0, "v")
    monkeypatch.setattr(ranks, "SIZE", 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        parts += range(10)[ranks.share(10)]
    assert parts == list(range(10)) and math.isclose(ranks.mean(torch.tensor([1, 2])), 1.5)


ENDS = {  # what is raised: exit code, what stderr says
    "nothing": (None, 0, ""),
    "a mistake": (InputError("no\nfile"), 2, "error: no\\nfile\n"),
    "a missing file": (OSError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
    "Ctrl-C": (KeyboardInterrupt(), 130,
               "\ninterrupted; what was done so far is in RUN; "
               "to go on: python train.py --resume RUN\n"),
    "SIGTERM": (program.Terminated(), 143, "\ninterrupted; what was done so far is in RUN; "
                                           "to go on: python train.py --resume RUN\n"),
    "no memory": (RuntimeError("can't allocate memory"), 2,
                  "error: out of memory; lower --rollout-rows or --max-new-tokens for sampling; "
                  "for updates use --recompute\n"),
    "a lost rank": (ranks.Alone("gone"), 2,
                    "error: gone; to go on: python train.py --resume RUN\n"),
    "a closed pipe": (BrokenPipeError(), 141, ""),
}


@pytest.mark.parametrize("name", ENDS)
def test_exit_codes(name, tmp_path, capsys):
    error, code, words = ENDS[name]
    handlers = [signal.getsignal(number) for number in program.SIGNALS]
    args = SimpleNamespace(out=str(tmp_path), eval_only=False)
    saved = []

    def work(args):
        with program.saving_on_error(saved.append, "saved"):
            if error:
                raise error
    assert program.run_main(lambda: args, work, resumable=True) == code
    assert capsys.readouterr().err == words.replace("RUN", str(tmp_path))
    assert saved == (["saved"] if error else [])
    assert [signal.getsignal(number) for number in program.SIGNALS] == handlers


def test_a_bug_is_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        program.run_main(lambda: None, lambda args: exec("raise RuntimeError('a bug')"))


@pytest.mark.parametrize("work", ["for i in range(10**5): print(i)", "print('x' * 10)"])
def test_a_closed_stdout_ends_quietly(work):
    """`| head` printed a traceback, or Python's own complaint at exit."""
    code = (f"import sys, time\nfrom support.program import run_main\n"
            f"def work(args):\n    time.sleep(0.2)\n    {work}\n"
            f"sys.exit(run_main(lambda: None, work))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
