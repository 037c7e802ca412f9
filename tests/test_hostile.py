"""Model folders, adapters, data and runs that are made to do harm, from the command line.

Each is refused in one line within seconds, with less than a GB of memory; nothing hangs, and
nothing reaches the terminal that it would obey.
"""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from helpers import ROOT, TINY_RUN, TOY, one_error, read_rows

import tinylora
import train
from support import resume, sandbox
from support.chat_format import Chat
from support.errors import InputError
from support.flags import parse
from support.terminal import printable, shell_word
from tools import export

EVALUATE = ["--eval-only", "--eval-count", "2", "--max-new-tokens", "4", "--data", str(TOY)]
ESCAPE = "a\x1b[31m\x9b2J\u202eb"


def run(folder, out, *flags):
    return train.main(["--model", str(folder), *EVALUATE, *flags, "--out", str(out)])


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TOY, tmp_path / "m")


# ------------------------------------------------------------------------------------- tokenizers

def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(steps, part="normalizers"):
    return {"type": "Sequence", part: steps}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


BOMBS = {  # what becomes of tokenizer.json, by name
    "a normalizer that doubles 40 times": {"normalizer": sequence([replace("e", "ee")] * 40)},
    "one that writes 1 GB for each letter": {
        "normalizer": sequence([replace("e", "e" * 1000)] * 3)},
    "one that prepends without end": {
        "normalizer": sequence([{"type": "Prepend", "prepend": "e" * 999}, *[
            replace("e", "eeee")] * 20])},
    "a normalizer's regular expression": {
        "normalizer": sequence([replace("e", "x" * 40), replace("(x+x+)+y", "", "Regex")])},
    "a pre-tokenizer's regular expression": {
        "normalizer": replace("e", "x" * 60), "pre_tokenizer": split("(x+x+)+y")},
    "a regular expression too large": {"pre_tokenizer": split("((((e{1,999}){1,999}){1,99})")},
    "a decoder that doubles 40 times": {
        "decoder": sequence([replace(".", "e", "Regex"), *[replace("e", "ee")] * 40], "decoders")},
    "a decoder's regular expression": {
        "decoder": sequence([replace(".", "x" * 60, "Regex"),
                             replace("(x+x+)+y", "", "Regex")], "decoders")},
}


@pytest.mark.parametrize("name", BOMBS)
def test_tokenizers_are_stopped(name, folder, tmp_path, capsys):
    """17 KB of tokenizer.json took 6 GB and aborted the process, without a word."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | BOMBS[name]))
    start = time.time()
    assert run(folder, tmp_path / "out") == 2
    one_error(capsys, "cannot be used as a tokenizer")
    assert time.time() - start < 20
    Chat(TOY).prompt("Q?")  # the next one works
    if sys.platform == "linux":
        limits = resource.prlimit(sandbox.child.pid, resource.RLIMIT_AS)
        assert limits == (sandbox.MEMORY, sandbox.MEMORY) and sandbox.MEMORY < 1e9


def test_a_tokenizer_of_real_size_fits_the_limits(tmp_path):
    """40,000 merges, three times the toy's alphabet: nothing is refused, no id is lost."""
    raw = json.loads((TOY / "tokenizer.json").read_text())
    raw["model"] |= {"vocab": dict(raw["model"]["vocab"])}
    tokens = [f"<{i}>" for i in range(50_000)]
    raw["added_tokens"] += [
        {"id": 561 + i, "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False} for i, token in enumerate(tokens)]
    text = json.dumps(raw)
    (size, ids), error = sandbox.tokenize(text, "find", tokens)
    assert error is None and size == 50_561 and len(ids) == 50_000
    assert sandbox.tokenize(text, "encode", "".join(tokens[:3]))[0] == [561, 562, 563]


@pytest.mark.parametrize("template,words", [
    ("", "make nothing of a question"), ("{# nothing #}", "make nothing of a question"),
    ("{{ '7 ' * 100000 }}", "tokens"), ("{{ messages[0].content * 9999 }}", "1,000,000")])
def test_prompts_of_no_size(template, words, folder, tmp_path, capsys):
    """A prompt without a token was a traceback; one of 100,000 asks for their square in memory."""
    (folder / "chat_template.jinja").write_text(template)
    assert run(folder, tmp_path / "out") == 2
    one_error(capsys, words)


def test_a_question_of_any_length(tmp_path, capsys):
    """The same from a data file."""
    row = json.dumps({"question": "7 " * 100_000, "answer": "1"})
    (tmp_path / "d.jsonl").write_text(row + "\n")
    assert run(TOY, tmp_path / "out", "--data", str(tmp_path / "d.jsonl")) == 2
    one_error(capsys, "tokens", "the limit is")


# ------------------------------------------------------------------------------------- the terminal

def test_texts_of_others_are_shown_not_obeyed(folder, tmp_path, capfd):
    """tinylora.json, the data's rows, a config.json and an adapter's header may say anything."""
    (folder / "tinylora.json").write_text(json.dumps(
        {"data": ".", "system": ESCAPE, "instruction": f"\n{ESCAPE}"}))
    out = tmp_path / f"{ESCAPE}.run"
    assert train.main(["--model", str(folder), *TINY_RUN, "--steps", "1", "--out", str(out)]) == 0
    adapter = out / "adapter.safetensors"
    assert export.main(["show", str(adapter)]) == 0
    for form in ("peft", "merged"):
        new = ["--to", form, "--out", str(tmp_path / f"{form}{ESCAPE}")]
        assert export.main(["export", str(adapter), *new]) == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"torch": ESCAPE}))
    (out / "summary.json").unlink()
    assert train.main(["--resume", str(out)]) == 0
    assert train.main(["--resume", str(out)]) == 0
    for bad in ({"eos_token": ESCAPE, "chat_template": ["{{"]}, {"chat_template": f"{ESCAPE}{{{{"}):
        (folder / "tokenizer_config.json").write_text(json.dumps(bad))
        assert run(folder, tmp_path / "other") == 2
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "?", "answer": ESCAPE}) + "\n")
    assert run(TOY, tmp_path / "other", "--data", str(tmp_path / "d.jsonl")) == 2
    text = "".join(capfd.readouterr())
    assert not set(text) & set("\x1b\x9b\u202e") and "\\x1b[31m" in text
    command = re.search(r"next: python train.py (.*)", text)[1]
    echo = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True)
    assert ESCAPE in echo.stdout.decode().split("\0")  # the command still says the same


def test_words_for_a_shell():
    for word in ("plain", "it's", "two words", "", "a\nb", "\\x'\x1b", "\x85é\u202e\U0001f600'$x"):
        echo = subprocess.run(["bash", "-c", f"printf %s {shell_word(word)}"], capture_output=True)
        assert echo.stdout.decode() == word and shell_word(word).isprintable()
    assert printable("a\nb\x07", keep="\n") == "a\nb\\x07"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_closed_streams(closed, tmp_path):
    """input() and print() on a stream that is not there were a traceback."""
    flags = "--chat"
    if closed != "<&-":
        flags = f"--eval-only --eval-count 2 --max-new-tokens 4 --out {tmp_path}"
    done = subprocess.run(["bash", "-c", f"{sys.executable} train.py {flags} {closed}"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr


def test_an_accent_where_the_locale_has_none(folder, tmp_path):
    """A model folder's system message ended a run at its first line."""
    (folder / "tinylora.json").write_text(json.dumps({"system": "Sé breve."}))
    done = subprocess.run(
        [sys.executable, "train.py", *EVALUATE, "--model", folder, "--out", tmp_path / "e"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"PATH": "/usr/bin", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "S\\xe9 breve." in done.stdout


# ---------------------------------------------------------------------------------- files and links

def parsed(*flags):
    return parse(list(flags), train.__doc__, train.RECIPE, train.LR)


@pytest.mark.parametrize("data", ["/etc/passwd", "..", "out", "loop", "a\0b", "linked", "~",
                                  "x/../.."])
def test_data_of_a_folder_stay_in_it(data, folder, tmp_path, capsys):
    """By a name, by a link to a folder, by a link to a file in it."""
    (folder / "out").symlink_to("/etc")
    (folder / "loop").symlink_to("loop")
    (folder / "linked").mkdir()
    (folder / "linked" / "train.jsonl").symlink_to("/etc/passwd")
    (folder / "tinylora.json").write_text(json.dumps({"data": data}))
    assert train.main(["--model", str(folder), "--out", str(tmp_path / "o")]) == 2
    one_error(capsys, "no such file" if data == "~" else "is not inside the model")
    assert not (tmp_path / "o").exists()
    if data == "linked":  # what the user says himself is another matter
        assert parsed("--model", str(folder), "--data", str(TOY)).data == str(TOY)


def test_data_files_are_read_row_by_row(tmp_path, capsys):
    """Refused at the first bad row, at a long one, at the millionth: not after all is in memory."""
    path = tmp_path / "d.jsonl"
    row = '{"question": "?", "answer": "1"}\n'
    for data, words in (("{}\n" * 10**6, "line 1"), (row + "x" * 2**23, "line 2"),
                        (row + "\n" * 2**21, "lines")):
        path.write_text(data)
        start = time.time()
        assert run(TOY, tmp_path / "out", "--data", str(path)) == 2
        one_error(capsys, words)
        assert time.time() - start < 10
    os.truncate(path, 2**27)
    assert run(TOY, tmp_path / "out", "--data", str(path)) == 2


def test_a_run_with_pipes_in_it(tmp_path, capsys):
    """Opening one waits for ever."""
    out = tmp_path / "run"
    assert train.main([*TINY_RUN, "--steps", "1", "--out", str(out)]) == 0
    (out / "summary.json").unlink()
    for name in ("log.jsonl", "samples.jsonl", "config.json", *resume.FILES):
        copy = shutil.copytree(out, tmp_path / name)
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
        if name == "state-0.safetensors":
            (copy / resume.FILES[1]).write_bytes(b"")
        capsys.readouterr()
        code = train.main(["--resume", str(copy)])
        assert code == (0 if name == "state-1.safetensors" else 2), name


CONFIG = [{"steps": None}, {"steps": 2**70}, {"params": [1]}, {"lr": "nan"}, {"model": "\0"},
          {"max_new_tokens": 2**40}, {"eval_only": "no"}, {"trained": {"base": 3}}, {"seed": -1},
          {"u": 2**20, "params": 2**20, "rank": 16}, {"problems": None}, {"group": 1e300}]


@pytest.mark.parametrize("changes", CONFIG, ids=str)
def test_settings_of_a_run_that_are_damaged(changes, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*TINY_RUN, "--steps", "0", "--out", str(out)]) == 0
    (out / "summary.json").unlink()
    (out / "config.json").write_text(
        json.dumps(json.loads((out / "config.json").read_text()) | changes))
    capsys.readouterr()
    assert train.main(["--resume", str(out), "--steps", "1"]) == 2
    one_error(capsys)


def test_states_that_do_not_fit(tmp_path):
    """With a checksum that is right: another run's, or made by hand."""
    done = '{"step": 1, "slot": 0, "log.jsonl": 0, "samples.jsonl": 0}'
    params = [torch.zeros(3, 1, requires_grad=True)]
    optimizer = torch.optim.AdamW(params)
    fine = {"param.0": torch.zeros(3, 1)}
    for text, tensors in (
            ("", fine), ("[]", fine), ('{"step": 1}', fine), (done.replace("1", '"1"'), fine),
            (done.replace('"slot": 0', '"slot": 7'), fine), (done, {"param.0": torch.zeros(4, 1)}),
            (done, {"param.1": torch.zeros(3, 1)}), (done, {"x": torch.zeros(3)}),
            (done, fine | {"reference.0": torch.zeros(3, 1)}),
            (done, fine | {"exp_avg.0": torch.zeros(3, 1)})):
        header = {"done": text, "sha256": resume.checksum(text, tensors)}
        save_file(tensors, tmp_path / resume.FILES[0], header)
        with pytest.raises(InputError):
            resume.load(tmp_path, params, optimizer, None)
    header = {"done": done, "sha256": resume.checksum(done, fine)}
    save_file(fine, tmp_path / resume.FILES[0], header)
    assert resume.load(tmp_path, params, optimizer, None)["step"] == 1


def test_an_adapter_of_many_numbers(tmp_path, capsys):
    """A hole of 4 GB in which every number is 0, and a header that fits it."""
    model = train.transformer.load(TOY)
    v = tinylora.adapt(model, 13)
    model.adapter |= {"groups": 1, "u": 2**30}
    tinylora.save(tmp_path / "a", v, model)
    data = (tmp_path / "a").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header["v"] |= {"shape": [2**30], "data_offsets": [0, 2**32]}
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "a", 8 + len(text) + 2**32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run(TOY, tmp_path / "out", "--adapter", str(tmp_path / "a")) == 2
    one_error(capsys, "the limit is")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 3e5  # kB


def test_headers_of_a_million_names(folder, tmp_path, capsys):
    """80 MB of names took 2.2 GB and half a minute, for an adapter, a LoRA or a model."""
    entry = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % i for i in range(200_000)) + "}").encode()
    data = len(text).to_bytes(8, "little") + text
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    places = (folder / "model.safetensors", tmp_path / "a",
              tmp_path / "lora" / "adapter_model.safetensors")
    for path in places:
        path.write_bytes(data)
    for flags in (["--model", str(folder)], ["--adapter", str(tmp_path / "a")],
                  ["--adapter", str(tmp_path / "lora")]):
        assert train.main([*EVALUATE, *flags, "--out", str(tmp_path / "out")]) == 2
        one_error(capsys, "its header has")


# --------------------------------------------------------------------------------------- samples

def test_rollouts_are_kept_now_and_then(tmp_path):
    """With their rewards: the first --samples of steps 1 and 11, in whole groups."""
    flags = ["--steps", "12", "--prompts", "2", "--group", "4", "--max-new-tokens", "60"]
    out = tmp_path / "run"
    assert train.main([*flags, "--eval-count", "2", "--samples", "6", "--out", str(out)]) == 0
    rows = [row for row in read_rows(out / "samples.jsonl") if row.get("rollout")]
    assert [row["step"] for row in rows] == [1] * 6 + [11] * 6
    assert [len({row["prompt"] for row in rows[i:i + 4]}) for i in (0, 6)] == [1, 1]
    assert rows[0]["prompt"] != rows[4]["prompt"] and len({row["response"] for row in rows}) > 3
    for row in rows:
        problem = {"boxed": False, "gold": train.gsm8k.extract_answer("#### " + row["answer"].split(
            "####")[-1].strip())}
        assert row["scores"] == train.gsm8k.score(row["response"], problem)
