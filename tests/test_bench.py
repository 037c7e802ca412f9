"""bench/: the commands run, at the smallest sizes; what they measure is in docs/."""
import json
import subprocess
import sys

import pytest

from helpers import ROOT, TINY_RUN, needs

import train


def bench(*words):
    """A benchmark's output, and its last line as JSON."""
    command = [sys.executable, str(ROOT / "bench" / words[0]), *map(str, words[1:])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@needs("transformers")
def test_a_base_is_what_transformers_gets(tmp_path):
    """Greedy scores of a run, and of transformers' own generate; moved model and data."""
    out = tmp_path / "run"
    assert train.main([*TINY_RUN, "--steps", "0", "--out", str(out)]) == 0
    _, result = bench("check_base.py", out)
    assert result["equal"] and result["problems"] == 8
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"model": "gone", "data": "gone"}))
    _, result = bench("check_base.py", out, "--model", ROOT / "toy", "--data", ROOT / "toy")
    assert result["equal"]
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "check_base.py"), str(out)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --model gone: no such folder\n"


def test_rounding():
    """Of a change in fp32, most is there in bf16 and not several times as much."""
    text, result = bench("rounding.py", "--directions", "3", "--tokens", "200")
    assert text.count(" +- ") == 3
    assert [len(shares) for shares in result.values()] == [3, 3, 3]
    assert 0.5 < sum(result["0.02"]) / 3 < 1.5


def test_scale():
    text, result = bench("scale.py", "--shapes", "toy", "--batches", "8", "--tokens", "96",
                         "--rounds", "3")
    assert "failed" not in text
    # a difference of two times: of few tokens and one round, noise made it negative
    assert result["toy, batch 8, group 4, 96 tokens, decode"]["tokens/s"] > 0
    assert result["toy, batch 8, group 4, 96 tokens, update"]["tokens a micro-batch"] == 2048


def test_scale_on_a_gpu_that_does_not_exist(monkeypatch, capsys):
    """The part of the script that only a GPU would run: ceilings, the graph, the recipe."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import common
    import scale
    monkeypatch.setattr(common, "clock", common.clock)  # which a dry run replaces
    monkeypatch.setitem(scale.SHAPES, "toy", (576, 128, 384, 1, 4, 2, 32, True))  # of one layer
    monkeypatch.setattr(sys, "argv", ["scale.py", *"--dry --shapes toy --batches 8".split()])
    scale.main()
    text = capsys.readouterr().out
    result = json.loads(text.splitlines()[-1])
    assert "failed" not in text and result["TFLOP/s"] == 989.0
    graph = result["graph against plain, torch.bfloat16"]["replayed"]
    assert graph["rows with the same tokens"] == "32 of 32"
    assert result["toy, the paper's recipe, graph"]["response tokens"] == 256 * 16


SMALL = ("--problems", "2", "--group", "2", "--tokens", "8", "--rounds", "1")


@needs("transformers", "trl", "peft", "datasets")
def test_speed():
    kinds = ("rollout", "step", "skew", "many", "head")
    _, result = bench("speed.py", *kinds, *SMALL, "--lengths", "limit")
    assert set(result["rollout"]["limit"]) == {"fast", "plain", "default", "static", "ratio",
                                               "fast to plain"}
    assert result["step"]["limit"]["trl, fastest"] > 0 and result["skew"]["ratio"] > 0
    assert result["many"][f"tokens alike, of {4 * 8}"]["one v"] == 32
    assert set(result["head"]) == {"float32", "bfloat16"}


@pytest.mark.parametrize("name,words", [("speed.py", ["sing"]), ("scale.py", ["--batches", "7"]),
                                        ("speed.py", ["skew", "--model", "nowhere"])])
def test_mistakes(name, words):
    done = subprocess.run([sys.executable, str(ROOT / "bench" / name), *words], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_mawps(tmp_path):
    """Single-op problems only; numbers as gsm8k.py reads them."""
    rows = [{"input": f"q{i}", "target": 2.0 if i else 0.5, "type": "singleop" if i % 2 else "x"}
            for i in range(120)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "bench" / "mawps.py"), str(tmp_path / "m.jsonl")]
    subprocess.run([*command, str(tmp_path / "out")], check=True)
    test = (tmp_path / "out" / "test.jsonl").read_text().splitlines()
    assert len(test) == 48 and json.loads(test[0]) == {"question": "q1", "answer": "2"}
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 12


@needs("math_verify")
def test_boxed_agreement(tmp_path):
    path = tmp_path / "gold.jsonl"
    rows = [{"answer": answer} for answer in ("\\frac{1}{2}", "10", "(1,2)", "x^2+1")]
    rows.append({"problem": "Factor $x^2-1$.", "answer": "(x-1)(x+1)"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, result = bench("boxed_agreement.py", path)
    assert result["pairs"] > 40 and result["all but trailing dots"] > 0.8
    assert result["paid for a copy of the question"] == {"same": 0, "math-verify": 1}


def test_verify_tests(tmp_path):
    """Tables of pytest; a pair that has two verdicts, long texts and other tables are left out."""
    (tmp_path / "test_a.py").write_text(
        "@pytest.mark.parametrize('gold,pred,expected', [('$1/2$', 'is $0.5$', 1), ('1', '2', 0),\n"
        "    ('2i+1', r'\\boxed{1+2i}', 1), ('9', '$9+0$', 1), ('5', 'x', 0), ('5', 'x', 1),\n"
        "    ('$1$ and $2$', '1', 0), ('3', 'y' * 40, 1)])\ndef test(): pass\n"
        "@pytest.mark.parametrize('n', [1])\ndef test_other(): pass\n")
    _, result = bench("verify_tests.py", tmp_path)
    assert result == {"cases": 4, "agree": 3, "paid wrongly": 0}
