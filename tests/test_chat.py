"""tools/chat.py: --chat, what the base and the adapted model say to what is typed."""
import io
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT, TOY, one_error, random_v, tiny, write_folder

import fast
import grpo
import gsm8k
import model as transformer
import tinylora
import train
from methods import lora
from support import datasets
from support.chat_format import Chat
from tools import chat

ADAPTER = ROOT / "results" / "toy-seed0" / "adapter.safetensors"
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have now?"
ENGINES = {"fast": fast, "plain": grpo}


def args(**flags):
    return SimpleNamespace(**{"max_new_tokens": 40, "system": None} | flags)


def answer_of(model, text=QUESTION + gsm8k.INSTRUCTION):
    """What this model alone says, greedily."""
    words = Chat(TOY)
    rollout = grpo.generate(model, [words.prompt(text)], 1, 40, words.stop_ids, 0.0)
    return words.decode(rollout.ids[0], rollout.mask[0])


def typed(monkeypatch, *lines):
    """The lines as if they were typed; bytes are given as bytes."""
    data = b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_are_those_of_each_model_alone(engine):
    """Zero v (or A and B) is the base; what was trained is back in its place afterwards."""
    words = Chat(TOY)
    model = transformer.load(TOY)
    base = answer_of(model)
    prompt = QUESTION + gsm8k.INSTRUCTION
    engine = ENGINES[engine]
    assert chat.answers(model, words, engine, [], args(), prompt) == {"base": base}
    v = tinylora.load(ADAPTER, model, fast.svd)
    kept = v.clone()
    want = {"base": base, "adapted": answer_of(model)}
    assert want["adapted"] != base
    assert chat.answers(model, words, engine, [v], args(), prompt) == want
    assert torch.equal(v, kept)
    model = transformer.load(TOY)
    params = lora.adapt(model, 2)
    for i, p in enumerate(params[1::2]):
        random_v(p, 0.01, seed=i)
    want = {"base": base, "adapted": answer_of(model)}
    assert want["adapted"] != base
    assert chat.answers(model, words, engine, params, args(), prompt) == want


def test_terminal_codes_are_shown_not_obeyed(monkeypatch):
    words = Chat(TOY)
    monkeypatch.setattr(words, "decode", lambda ids, mask: "a\x1b[31m\nb")
    model = transformer.load(TOY)
    texts = chat.answers(model, words, grpo, [], args(), "Hi")
    assert texts == {"base": "a\\x1b[31m\nb"}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_conversation(engine, capsys, monkeypatch):
    """Two questions of the data's kind, what is appended to each, both answers one below the
    other; an empty line ends it."""
    typed(monkeypatch, QUESTION, "", QUESTION)
    flags = ["--chat", "--max-new-tokens", "40", "--adapter", str(ADAPTER), "--engine", engine]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    base = answer_of(transformer.load(TOY))
    model = transformer.load(TOY)
    tinylora.load(ADAPTER, model, fast.svd)
    assert out.count(f"base:\n{base}\n\nadapted:\n{answer_of(model)}\n") == 1
    assert gsm8k.INSTRUCTION.strip() in out and '--instruction ""' in out
    _, rows = gsm8k.load(str(TOY))
    assert all(f"  {row['question']}\n" in out for row in rows[:2])


def test_without_an_instruction(capsys, monkeypatch):
    """--instruction "": the question as it is typed."""
    typed(monkeypatch, QUESTION)
    assert train.main(["--chat", "--max-new-tokens", "40", "--instruction", ""]) == 0
    out = capsys.readouterr().out
    assert "appended" not in out
    assert f"base:\n{answer_of(transformer.load(TOY), QUESTION)}\n" in out and "adapted" not in out


def test_bytes_that_are_no_text(capsys, monkeypatch):
    """One line for the question, and the next one is answered. They ended in a traceback."""
    typed(monkeypatch, b"\xff\xfe?", QUESTION)
    assert train.main(["--chat", "--max-new-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert out.count("error: the question is not valid UTF-8\n") == 1 and out.count("base:") == 1


def test_as_a_program():
    """In a process of its own, where stdin is a pipe and the locale knows only ASCII."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--chat", "--max-new-tokens", "8"], cwd=ROOT,
        input="Wie viel? \u2603\n".encode() + b"\xff\n", capture_output=True,
        env={"PATH": "/usr/bin", "LC_ALL": "POSIX", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1",
             "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"not valid UTF-8" in done.stdout


TASK = '''
def prompt(row, instruction=None):
    return {form} + (" Answer in one word." if instruction is None else instruction)

def score(text, row):
    return {{"right": float(text.strip() == row["answer"])}}
'''


@pytest.mark.parametrize("form,appended,shown", [
    ('row["text"]', "Answer in one word.", "What is up?"),
    ('"Q: " + row["text"]', None, "Q: What is up? Answer in one word.")])
def test_any_task(form, appended, shown, tmp_path, capsys, monkeypatch):
    """What follows a row's text in its prompt is appended to what is typed. Where a prompt does not
    begin with such a text, the examples show the whole of it, and the question goes as typed."""
    (tmp_path / "task.py").write_text(TASK.format(form=form))
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "What is up?", "answer": "sky"}\n')
    seen = []
    monkeypatch.setattr(chat, "answers", lambda *args: seen.append(args[-1]) or {"base": "x"})
    flags = ["--chat", "--task", str(tmp_path / "task.py")]
    typed(monkeypatch, "Who is there?")
    assert train.main([*flags, "--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"  {shown}\n" in out
    assert seen == ["Who is there?" + (f" {appended}" if appended else "")]
    assert (f"  {appended}\n" in out) == bool(appended)


def test_no_data_is_fetched_for_two_questions(tmp_path, capsys, monkeypatch):
    """A model folder without a tinylora.json has GSM8K for its data: nothing is downloaded."""
    folder = write_folder(tmp_path / "m", tiny(vocab=576))
    (tmp_path / "task.py").write_text(TASK.format(form='row["text"]'))
    monkeypatch.setattr(datasets, "download", None)
    monkeypatch.setattr(gsm8k, "load", None)
    for flags, words in (([], chat.GSM8K_EXAMPLES[0]), (["--task", str(tmp_path / "task.py")], "")):
        typed(monkeypatch)
        assert train.main(["--chat", "--model", str(folder), "--device", "cpu", *flags]) == 0
        out = capsys.readouterr().out
        assert words in out and ("Questions like" in out) == bool(words)


@pytest.mark.parametrize("flag", ["--steps 3", "--params 13", "--eval-data math500", "--out x",
                                  "--eval-only", "--algo sft", "--seed 0"])
def test_flags_that_mean_nothing_to_a_chat(flag, capsys):
    assert train.main(["--chat", *flag.split()]) == 2
    one_error(capsys, "leave it out")


@pytest.mark.parametrize("flag", ["--steps 3", "--seed 0", "--lr 0.1"])
def test_flags_that_mean_nothing_to_an_evaluation(flag, capsys):
    assert train.main(["--eval-only", *flag.split()]) == 2
    one_error(capsys, f"{flag.split()[0]} means nothing to --eval-only: leave it out")


def test_a_tokenizer_that_is_too_large(tmp_path, capsys, monkeypatch):
    """The error is one line before anything is asked."""
    typed(monkeypatch, QUESTION)
    folder = write_folder(tmp_path / "m", tiny(vocab=50))
    assert train.main(["--chat", "--model", str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "ids" in message
    shutil.rmtree(folder)
    assert train.main(["--chat", "--model", str(folder)]) == 2
