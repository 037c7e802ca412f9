"""Whole commands under damaged inputs: flags, model folders, adapters, data, stopped runs, tools.

Each of 120 cases is a command as a user would type it, run in this process. It works, or ends with
exit code 2 and one line; within 10 s; nothing is written outside its folder; nothing that a
terminal obeys is printed. TINYLORA_FUZZ=25 makes 3,000 cases of them.
"""
import contextlib
import io
import os
import random
import resource
import shutil
import sys
import time
import traceback

import pytest

from helpers import TOY
from test_fuzz import TEMPLATES, damaged, good, mutated, watching  # noqa: F401 (good: a fixture)

import train
from methods import es, lora, sft  # noqa: F401 (imported here, so that no .pyc is written later)
from support import datasets
from support.errors import InputError
from support.flags import PROGRAM
from tools import chat, export, plot  # noqa: F401
from tools.runs import pyplot

CASES = {"flags": 40, "model": 30, "adapter": 15, "data": 10, "resume": 15, "tools": 10}
SMALL = ["--steps", "1", "--prompts", "2", "--group", "2", "--minibatches", "1",
         "--max-new-tokens", "4", "--eval-count", "2"]
# No large number that is allowed: it would only take long.
NUMBERS = ["-1", "0", "1", "2", "3", "-0", "1.5", "1_0", "0x10", "1e3", " 2", "٣", "", "two",
    "NaN",
           "inf", "-inf", "1e400", "-1e-5", "1e-400", str(2**31 + 1), str(2**32), str(2**40),
           str(2**62), str(2**63 - 1), str(2**63), str(2**64), "9" * 400, "9" * 5000]
TEXTS = ["", "x", "é", "nowhere", "/etc/passwd", "/dev/null", "/dev/zero", "/", "..", "~", "a/b",
         "a\x1b[31mb", "\x9b2J\u202e", "\udcff", "x" * 300, "x" * 70_000, "a\nb", "--", "-x", "%s",
         "{}", "gsm8k", "amc23", "cpu:0", "cuda:1", "meta", "mps", "/proc/self/mem", "/proc/x/y"]
LINES = [b"2 + 2?", b"\xff\xfe", b"\x1b[31m", b"\0", b"x" * 10**6, "\u2028".encode(), b"\r", b""]
KINDS = {name: kind for name, _, kind, _ in (*train.RECIPE, *PROGRAM)}
LEFT_OUT = ("model", "data", "out", "resume", "wandb", "task")  # in other ways below


@contextlib.contextmanager
def as_typed(data):
    """What the program would read from a terminal or a pipe."""
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    try:
        yield
    finally:
        sys.stdin = before


def run(main, words, root, data=b""):
    """Run a command; returns its exit code. AssertionError: it did not end as it should."""
    out = io.StringIO()
    errors = io.StringIO()
    start = time.time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), as_typed(data), \
            watching(root):
        try:
            code = main(words)
        except SystemExit as end:  # --help
            code = end.code
    seconds = time.time() - start
    said = errors.getvalue()
    shown = (out.getvalue() + said).replace("\n", "")
    assert shown.isprintable(), shown
    assert code in (0, 2), (code, said)
    if code == 2:
        assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 5000, said
    assert seconds < 10, seconds
    return code


def flags_case(rng, good, root):
    """One to four flags with any values, beside those of a small run."""
    words = {"model": str(good), "data": str(TOY)}
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        name = rng.choice([name for name in KINDS if name not in LEFT_OUT])
        kind = KINDS[name]
        if kind is bool:
            words[name] = None
        elif isinstance(kind, list):
            words[name] = rng.choice([*kind, *TEXTS])
        else:
            values = TEXTS if kind is str else rng.choice([NUMBERS, ["1", "2"]])
            words[name] = rng.choice(values)
    if rng.random() < 0.1:
        name = rng.choice(LEFT_OUT)
        inside = [text for text in TEXTS if "/" not in text and text != ".."]
        words[name] = rng.choice(inside if name == "out" else TEXTS)
    line = [word for name, value in words.items()
            for word in ([f"--{name}"] if value is None else rng.choice([[f"--{name}={value}"],
                                                                   [f"--{name}", value]]))]
    small = [word for name, value in zip(SMALL[::2], SMALL[1::2]) if name[2:] not in words
             and "eval-only" not in words for word in (name, value)]
    if "eval-only" in words:
        small = ["--max-new-tokens=4"] * ("max-new-tokens" not in words)
        small += ["--eval-count=2"] * ("eval-count" not in words)
    if "resume" not in words and "out" not in words:
        line += ["--out", str(root / "out")]
    typed = b"\n".join(rng.choice(LINES) for _ in range(3))
    return train.main, small + line, typed


MODEL_FILES = ("config.json", "model.safetensors.index.json", "tokenizer_config.json",
               "tokenizer.json", "generation_config.json", "tinylora.json",
               "model-00001-of-00002.safetensors", "chat_template.jinja")


def model_case(rng, good, root):
    """A model folder with one damaged file, evaluated, trained on, or asked."""
    name = rng.choice(MODEL_FILES)
    path = good / name
    if name.endswith(".jinja"):
        path.write_bytes(rng.choice(TEMPLATES).encode("utf-8", "surrogatepass"))
    elif rng.choice([False] * 12 + [True]):
        path.unlink()
        rng.choice([os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])(path)
    else:
        path.write_bytes(damaged(rng, name, path.read_bytes()))
    how = rng.choice([["--eval-only", "--eval-count=2", "--max-new-tokens=4"], SMALL, ["--chat"]])
    data = [] if name == "tinylora.json" and how != ["--chat"] else ["--data", str(TOY)]
    new = ["--max-new-tokens=4"] if how == ["--chat"] else ["--out", str(root / "out")]
    return train.main, [*how, *new, "--model", str(good), *data], rng.choice(LINES)


def adapter_case(rng, good, root):
    """A damaged adapter or LoRA: evaluated, trained on, shown or exported."""
    name = rng.choice(["adapter.safetensors", "adapter.safetensors", "lora/adapter_config.json",
                 "lora/adapter_model.safetensors"])
    if rng.random() < 0.7:
        (good / name).write_bytes(damaged(rng, name, (good / name).read_bytes()))
    path = str(good / name.split("/")[0])
    new = ["--out", str(root / "out")]
    if rng.choice([True, False]):
        how = rng.choice([["--eval-only", "--eval-count=2", "--max-new-tokens=4"], SMALL])
        return train.main, [*how, "--model", str(good), "--adapter", path, *new], b""
    if rng.choice([True, False]):
        return export.main, ["show", path], b""
    to = rng.choice(["peft", "merged"])
    return export.main, ["export", path, "--to", to, "--model", str(good), *new], b""


def data_case(rng, good, root):
    """A damaged file to evaluate on, or a folder with it."""
    whole = (good / "problems.jsonl").read_bytes()
    for name in ("train.jsonl", "test.jsonl"):
        (good / name).write_bytes(damaged(rng, name, whole) if rng.random() < 0.5 else whole)
    how, data = rng.choice([(["--eval-only", "--eval-count=2", "--max-new-tokens=4"], "test.jsonl"),
                      (SMALL, "."), (["--algo", "sft", *SMALL[:4], *SMALL[8:]], ".")])
    if rng.choice([False] * 10 + [True]):
        (good / "test.jsonl").unlink()
        os.mkfifo(good / "test.jsonl")
    return train.main, [*how, "--model", str(good), "--data", str(good / data), "--out",
                        str(root / "out")], b""


def resume_case(rng, good, root):
    """A stopped or finished run with a damaged file."""
    folder = shutil.copytree(root.parent / "stopped", root / "run")
    name = rng.choice(["config.json", "config.json", "state-0.safetensors", "state-1.safetensors",
                 "log.jsonl", "samples.jsonl", "summary.json"])
    path = folder / name
    if name == "summary.json" and rng.choice([True, False]):
        path.write_text(mutated(rng, {"steps": 2}))
    elif path.exists():
        path.write_bytes(damaged(rng, name, path.read_bytes()))
        (folder / "summary.json").unlink(missing_ok=True)
    if rng.choice([False] * 10 + [True]):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    return train.main, ["--resume", str(folder), *rng.choice([[], ["--steps", "3"]])], b""


def tools_case(rng, good, root):
    """Pictures of damaged runs, and any words for the tools."""
    pyplot().close("all")  # and before anything is watched: matplotlib makes a folder of its own
    if rng.choice([True, False]):
        folder = shutil.copytree(root.parent / "stopped", root / "run")
        name = rng.choice(["config.json", "log.jsonl", "summary.json"])
        (folder / name).write_bytes(damaged(rng, name, (folder / name).read_bytes()))
        claim = rng.choice([[], ["--claim"]])
        return plot.main, [*claim, str(folder), str(root / "out.png")], b""
    words = ["show", "export", "--to", "peft", "merged", "--out", "--model", "--dtype", "--claim",
             str(good / "adapter.safetensors"), str(root / "new"), str(good), *TEXTS]
    main = rng.choice([export.main, export.main, plot.main])
    return main, [rng.choice(words) for _ in range(rng.choice([1, 2, 3, 5, 7]))], b""


MAKERS = {"flags": flags_case, "model": model_case, "adapter": adapter_case, "data": data_case,
          "resume": resume_case, "tools": tools_case}


def no_network(url, path, sha256):
    raise InputError(f"{url} cannot be downloaded")


@pytest.fixture(scope="module")
def stopped(good, tmp_path_factory):
    """A folder with a run of two steps in "stopped"; the model in "good"."""
    root = tmp_path_factory.mktemp("fuzzed")
    flags = [*SMALL, "--model", str(good), "--data", str(TOY), "--out", str(root / "stopped")]
    flags[1] = "2"
    assert train.main(flags) == 0
    shutil.copytree(good, root / "good")
    return root


@pytest.mark.parametrize("kind", CASES)
def test_commands_work_or_say_why_not(kind, stopped, monkeypatch):
    """A failure says which case it was: TINYLORA_FUZZ_CASE=N runs that one alone."""
    counts = {0: 0, 2: 0}
    total = round(CASES[kind] * float(os.environ.get("TINYLORA_FUZZ", 1)))
    only = os.environ.get("TINYLORA_FUZZ_CASE")
    failures = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of other tests
    monkeypatch.setattr(datasets, "download", no_network)
    root = stopped / "case"
    for number in range(total) if only is None else [int(only)]:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        shutil.copytree(stopped / "good", root / "m")
        monkeypatch.chdir(root)
        main, words, typed = MAKERS[kind](random.Random(number), root / "m", root)
        try:
            counts[run(main, words, root, typed)] += 1
        except Exception:
            failures.append(f"{kind}, case {number}: {words!a:.2000}\n{traceback.format_exc()}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    print(f"{kind}: {counts[0]} worked, {counts[2]} refused; peak memory: {peak} kB")
    assert not failures, "\n".join([f"{len(failures)} failures", *failures[:20]])
    assert peak < max(1e6, before + 1) and (only or min(counts.values()) > 0)
