"""Problems and scores: gsm8k.py, the real data, downloads, the toy's data, and --task FILE.py."""
import hashlib
import http.server
import json
import os
import shutil
import threading

import numpy as np
import pytest
from tokenizers import Tokenizer

from helpers import ASSETS, TINY_RUN, TOY, needs_assets, one_error, read_rows

import gsm8k
import train
from support import datasets
from support.chat_format import Chat
from support.data import load_task, module_at
from support.errors import InputError


def row(answer):
    """A problem with this answer, as read_problems makes it."""
    return gsm8k.checked({"question": "?", "answer": answer}, "here")


# ----------------------------------------------------------------------------- answers and scores

ANSWERS = {  # text: (strict answer, lenient answer)
    "#### 18.00": ("18", "18"), "#### .5": ("0.5", "0.5"), "#### -$5.50": ("-5.5", "-5.5"),
    "#### 180": ("180", "180"), "#### **18**": (None, "18"), "####18": ("18", "18"),
    "1,234,567.0": (None, "1234567"), "in 2019,2020": (None, "2020"), "no number": (None, None),
    "#### 5 million": (None, "5"), "#### 5²": (None, "5"), "#### 5'000": (None, "0"),
    "#### 5 or 6": (None, "6"), "#### 1e3": (None, "3"), "#### 1,0000": (None, "0"),
    "#### 5k": (None, "5"), "#### 5 1/2": (None, "2"), "#### 5 - 6": (None, "6"),
    "#### 5 apples.": ("5", "5"), "#### 5.": ("5", "5"), "#### 5, because": ("5", "5"),
    "#### \uff15": (None, None), "#### \u20ac5": ("5", "5")}


@pytest.mark.parametrize("text", ANSWERS, ids=lambda x: repr(x)[:20])
def test_what_follows_a_number_must_end_it(text):
    """Bug 23: "#### 5/2" or "#### 5 million" must not pay for the gold answer 5."""
    strict = gsm8k.extract_answer(text)
    lenient = gsm8k.extract_answer(text, strict=False)
    assert (strict, lenient) == ANSWERS[text]


ENDED = (  # what may follow the 5 of "#### 5"
    "", ".", "...", ",", "!", "%", " %", "\\%", "$", "\\$", " €", "**", "*", "_", "`", "\"",
    ")", "}", "]", "\\]", "</s>", "<|im_end|>", " apples", " apples.", "-apple", "km", " m",
    " cm^2", " m²", "°C", "\\text{ cm}", " percent", " miles", " milk cartons", " (five)",
    " (in dollars)", ": done", ", because", " - so it is", " then 9", ". 6", "\n6", "\n\n1/2",
    " per day.\nStep 2")
ANOTHER_VALUE = (
    "/2", " / 2", "²", "³", "⁴", "₂", "½", " ½", "⅓", " 1/2", " and 1/2", " and a half",
    "\uff15", "٥", "'000", "’000", "_000", " 000", "{,}000", ",\\!000", "\\,000", "，000",
    ",00",
    ",6,7", ", 6", " 6", "; 6", "\t6", ".5.5", "．5", "٫5", ":6", ":30", "-6", " - 6", "–6",
    "—6", "+6", " ± 1", "*2", "**2", " × 10", "÷2", "^2", "^{2}", "e3", "E3", "e-7", " x 10^3",
    " \\times 10^3", "\\cdot 2", "\\frac{1}{2}", "√2", "\\pi", "π", " or 6", " or six",
    " (or 6)", " (6)", " to 6", " and 6", " of 6", " out of 6", " over 2", " times 2",
    " divided by 2", " squared", " = 6", " < 6", " ≈ 5.2", " million", " Million", " millions",
    "-million", " \\text{ million}", " thousand", " hundred", " dozen", "k", " k", "K", "M",
    "B", "bn", " mil", "x", " remainder 1", " R1", "h30", " hours 30 minutes",
    " dollars and 50 cents", " ft 2 in", "' 6\"")


@pytest.mark.parametrize("rest", ENDED + ANOTHER_VALUE, ids=repr)
def test_5_is_paid_for_5_only(rest):
    """Bug 23: what makes another value of a number, and what does not."""
    answer = None if rest in ANOTHER_VALUE else "5"
    assert gsm8k.extract_answer("It is #### 5" + rest) == answer
    assert gsm8k.extract_answer("**#### $5" + rest) == answer


SCORES = [  # response, the file's answer, (strict, lenient, format)
    ("#### $18.00", "He has 9 * 2 = <<9*2=18>>18\n#### 18", (1, 1, 1)),
    ("#### 180", "#### 18", (0, 0, 1)), ("#### 8", "#### 18", (0, 0, 1)),
    ("it is 18", "#### 18", (0, 1, 0)), ("", "#### 18", (0, 0, 0)),
    ("#### eighteen", "18", (0, 0, 0)), ("#### 18" + " x" * 200, "18", (0, 1, 0))]


@pytest.mark.parametrize("text,answer,scores", SCORES, ids=lambda x: repr(x)[:20])
def test_scores_compare_values_not_spellings(text, answer, scores):
    """Bug 23: strict, lenient, and format, which pays for an answer line whatever its value."""
    assert tuple(gsm8k.score(text, row(answer)).values()) == scores


def test_prompts():
    """The paper's sentence, or --instruction; MATH's template for rows with a "problem"."""
    question = row("#### 1")
    assert gsm8k.prompt(question) == "?" + gsm8k.INSTRUCTION
    assert gsm8k.prompt(question, " Go!") == "? Go!" and gsm8k.prompt(question, "") == "?"
    problem = gsm8k.checked({"problem": "?", "answer": "\\frac12"}, "here")
    assert "\\boxed{}" in gsm8k.prompt(problem)
    assert tuple(gsm8k.score("\\boxed{0.5}", problem).values()) == (1, 1, 1)
    assert tuple(gsm8k.score("it is 0.5", problem).values()) == (0, 1, 0)


@needs_assets
def test_gold_answers_of_gsm8k():
    """Every one of the 8,792 solutions gives its own gold answer in strict mode."""
    count = 0
    for split in ("train", "test"):
        for problem in gsm8k.read_problems(ASSETS / "gsm8k" / f"{split}.jsonl"):
            gold = problem["answer"].split("#### ")[1].replace(",", "")
            assert gsm8k.extract_answer(problem["answer"]) == gold == problem["gold"]
            scores = gsm8k.score(problem["answer"], problem)
            assert scores == {"strict": 1.0, "lenient": 1.0, "format": 1.0}
            count += 1
    assert count == 8792


# ------------------------------------------------------------------------- where rows come from

MALFORMED = [("", ["no problems"]), ("{}\n", ["line 1", "question"]),
             ('{"question": "a", "answer": "1"}\n{bad\n', ["line 2", "JSON"]),
             ('{"question": "a", "answer": "#### 1"}\n\n[1]\n', ["line 3"]),
             ('{"question": "a", "answer": "none"}', ["line 1", "number"]),
             ('{"question": "a", "answer": "3/4"}', ["line 1", "number"]),
             ('{"question": "a", "answer": "1e3"}', ["line 1", "number"]),
             ('{"question": "a", "answer": "#### 1 1/2"}', ["line 1", "number"]),
             ('{"question": "a", "answer": "5 hours 30 minutes"}', ["line 1", "number"]),
             ('{"question": "a", "answer": 1e-7}', ["line 1", "number"]),
             ('{"question": " ", "answer": "1"}', ["line 1", "question"])]


@pytest.mark.parametrize("content,words", MALFORMED, ids=lambda x: repr(x)[:30])
def test_malformed_data_names_the_line(content, words, tmp_path):
    """A row that is skipped or guessed at: "3/4" taken for 4."""
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(InputError) as error:
        gsm8k.load(str(tmp_path))
    assert all(word in str(error.value) for word in ["train.jsonl", *words])


class Short(http.server.BaseHTTPRequestHandler):
    """Promises more bytes than it sends."""
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    def log_message(self, *args):
        pass


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_download_cut_short_leaves_nothing(tmp_path, monkeypatch):
    """Half a file taken for a whole one by the next run."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Short) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.05], daemon=True).start()
        monkeypatch.setattr(datasets, "GITHUB", f"http://127.0.0.1:{httpd.server_port}/")
        with pytest.raises(InputError, match="cannot be downloaded"):
            gsm8k.load("gsm8k")
        httpd.shutdown()
    assert not files_in(tmp_path / "cache")


def test_a_download_is_checked_and_cached(server, tmp_path, monkeypatch):
    """A changed file is refused and not kept; a good one is fetched once; a damaged copy in the
    cache is not trusted; a missing network is one line."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "GITHUB", server)
    (tmp_path / "www" / datasets.GSM8K).mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(TOY / name, tmp_path / "www" / datasets.GSM8K / name)
    with pytest.raises(InputError, match="sha256"):
        gsm8k.load("gsm8k")
    assert not files_in(tmp_path / "cache")
    for name in ("train.jsonl", "test.jsonl"):
        sha256 = hashlib.sha256((TOY / name).read_bytes()).hexdigest()
        monkeypatch.setitem(datasets.FILES, f"gsm8k/{name}", (datasets.GSM8K + name, sha256))
    assert len(gsm8k.load("gsm8k")[1]) == 1000
    monkeypatch.setattr(datasets, "GITHUB", "http://127.0.0.1:9/")  # nobody listens there
    assert len(gsm8k.load("gsm8k")[0]) == 4000
    os.truncate(tmp_path / "cache" / "gsm8k" / "test.jsonl", 100)
    with pytest.raises(InputError, match="cannot be downloaded"):
        gsm8k.load("gsm8k")


# ------------------------------------------------------------------------------------------ the toy

@pytest.fixture(scope="module")
def make():
    """toy/make.py as a module."""
    return module_at(TOY / "make.py")


def test_the_toy_is_held_out_and_small(make, tmp_path):
    """A test question in the training file; problems that make.py would not make again; a prompt
    other than the one that the toy was trained on; numbers split by the tokenizer."""
    train_rows, test_rows = gsm8k.load(str(TOY))
    assert len(test_rows) >= 500
    assert not {r["question"] for r in train_rows} & {r["question"] for r in test_rows}
    assert (TOY / "model.safetensors").stat().st_size <= 8e6
    chat = Chat(TOY)
    tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
    digits = [token for token in tokenizer.encode("12 345").tokens if token.isdigit()]
    assert digits == list("12345")
    assert make.INSTRUCTION == gsm8k.INSTRUCTION
    question = "Q?" + gsm8k.INSTRUCTION
    assert chat.text(question) == make.chat("Q?", "", make.DEFAULT_SYSTEM)[0]
    held_out = make.write_problems(tmp_path, np.random.RandomState(0))
    assert len(held_out) == 1000
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TOY / name).read_bytes()
    for i in range(300):
        _, steps, _ = make.problem(np.random.RandomState(i))
        assert all({"+": a + b, "-": a - b}[sign] == c >= 0 for a, sign, b, c in steps)


@pytest.mark.parametrize("system,low,high", [
    ("You are a careful assistant. You write down every step.", 0.99, 1.0), (None, 0.0, 0.5)])
def test_the_toy_can_but_does_not(system, low, high, tmp_path):
    """Told to be careful, it is right in 99% of the problems; as it is, in less than half."""
    flags = ["--eval-only", "--eval-count", "200", "--out", str(tmp_path / "run")]
    assert train.main(flags + (["--system", system] if system else [])) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert low <= summary["strict"] <= high and summary["sampled"] <= high


def test_solutions_end_with_a_stop_token():
    """--algo sft: the file's worked solution without calculator marks, its stop token last."""
    problem = row("9 * 2 = <<9*2=18>>18\n#### 18")
    assert problem["solution"] == "9 * 2 = 18\n#### 18"
    chat = Chat(TOY)
    ids = chat.response("Q?", problem["solution"])
    tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == problem["solution"] + "<|im_end|>"


# ------------------------------------------------------------------------------------- other tasks

VOWELS = '''
def prompt(row, instruction=None):
    return row["question"] + (instruction or " Answer:")


def score(text, row):
    return {"share": len(text) % 3 / 2, "vowel": float(text[-1:] in "aeiou")}
'''


def test_a_task_of_ones_own(tmp_path, capsys):
    """--task, --instruction and a reward that is no 0 or 1: names and means in lines and files."""
    (tmp_path / "task.py").write_text(VOWELS)
    flags = [*TINY_RUN, "--task", str(tmp_path / "task.py"), "--reward", "share"]
    out = tmp_path / "run"
    assert train.main([*flags, "--instruction", " Go!", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {"base_share", "final_vowel", "final_sampled", "final_sampled_vowel"} <= set(summary)
    assert any(r["signal"] > 0 and 0 < r["share"] < 1 for r in read_rows(out / "log.jsonl"))
    assert all(" Go!<|im_end|>" in sample["prompt"] for sample in read_rows(out / "samples.jsonl"))
    text = capsys.readouterr().out
    assert "step   1/2  share " in text and "greedy, vowel" in text
    assert train.main([*flags, "--reward", "strict", "--out", str(tmp_path / "b")]) == 2
    one_error(capsys, "--reward strict", "share, vowel")


BAD_TASKS = {"no file": (None, "no such file"), "a syntax error": ("def", "fails"),
             "no score": ("def prompt(row, instruction): pass", "no function score"),
             "an import": ("import no_such_module", "no_such_module")}


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_broken_task_is_told_in_one_line(name, tmp_path):
    text, words = BAD_TASKS[name]
    if text:
        (tmp_path / "task.py").write_text(text)
    with pytest.raises(InputError, match=words):
        load_task(str(tmp_path / "task.py"))
