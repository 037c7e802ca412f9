"""tools/forgetting.py: losses by another way, the toy's texts, before and after an adapter."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import ROOT, TOY, one_error, read_rows, tiny, write_folder

import model as transformer
import tinylora
import train
from methods import lora
from support.chat_format import Chat
from tools import forgetting, opened

ADAPTER = ROOT / "tests" / "recorded" / "adapters" / "toy-seed0.safetensors"  # of rank 2


@pytest.fixture(scope="module")
def toy():
    return forgetting.toy_maker(), Chat(TOY)


def measured(tmp_path, *words):
    out = tmp_path / "f.json"
    assert forgetting.main([*map(str, words), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_toys_texts(toy):
    """Held-out questions with right sums, in the announced style, as its training text has them."""
    make, chat = toy
    problems = read_rows(TOY / "test.jsonl")[:30]
    for problem in problems:
        steps = forgetting.sums_of(problem["answer"])
        assert 2 <= len(steps) <= 3
        assert problem["answer"].endswith(f"#### {steps[-1][3]}")
        assert all(d == (a + b if sign == "+" else a - b) for a, sign, b, d in steps)
    texts = forgetting.toy_texts(make, chat, problems)
    assert len(texts) == 8 and {len(pairs) for pairs in texts.values()} == {30}

    def decoded(ids):
        ids = torch.tensor(ids)
        return chat.decode(ids, torch.ones_like(ids, dtype=torch.bool))
    found = {style: [forgetting.style_of(decoded(ids)) for _, ids in texts[f"{style}, answers"]]
             for style in (*make.SYSTEM, "plain")}
    assert all(set(found[style]) == {style} for style in make.SYSTEM)
    assert set(found["plain"]) == set(make.SYSTEM)  # drawn
    whole = make.chat(problems[0]["question"], "", make.SYSTEM["hasty"])[0]
    assert texts["hasty, answers"][0][0] == chat.encode(whole)
    first, rest = texts["hasty, questions"][0]
    assert first + rest == chat.encode(whole) and len(first) == 1
    assert texts["careful, answers"][0][1][-1] in chat.stop_ids
    assert texts == forgetting.toy_texts(make, chat, problems)  # from a seed


@pytest.mark.parametrize("engine", ["fast", "plain"])
@torch.no_grad()
def test_losses(engine, toy):
    """Each text alone through the model, by torch's cross_entropy."""
    make, chat = toy
    problems = read_rows(TOY / "test.jsonl")[:5]
    pairs = forgetting.toy_texts(make, chat, problems)["hasty, answers"]
    flags = train.flags(["--eval-only", "--engine", engine])
    with opened.opened(flags, 3) as (run, params, some):
        assert params == [] and len(some) == 3
        nats, tokens = forgetting.losses(run, pairs)
    model = transformer.load(TOY)
    for (before, ids), x, n in zip(pairs, nats, tokens):
        logits = model(torch.tensor([before + ids]))[0, len(before) - 1:-1, :chat.vocab]
        want = F.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()
        assert n == len(ids) and x == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_the_error_is_of_paired_texts():
    before = np.array([10.0, 20.0, 30.0])
    found = forgetting.compared(before, before + [1, 2, 3], np.array([5, 5, 10]))
    assert (found["before"], found["after"], found["texts"], found["tokens"]) == (3, 3.3, 3, 20)
    assert found["error"] == pytest.approx(1 * 3**0.5 / 20)
    assert forgetting.compared(before[:1], before[:1], np.array([5]))["error"] is None


def test_before_and_after_an_adapter(tmp_path, capsys):
    """Before is the base; after, --eval-only's score of the adapter; and its own prose."""
    found = measured(tmp_path, ADAPTER, "--count", "12", "--text", ROOT / "LICENSE")
    table = capsys.readouterr().out
    assert "| asked for (12 problems) |" in table and "| guess, answers | 12 |" in table
    assert found["count"] == 12 and set(found["asked"]) == {"careful", "hasty", "guess", "plain"}
    assert f"prose, {ROOT / 'LICENSE'}" in found["loss"] and len(found["loss"]) == 9
    for words, when in (([], "before"), (["--adapter", str(ADAPTER)], "after")):
        for system, style in ((None, "plain"), (forgetting.toy_maker().SYSTEM["guess"], "guess")):
            out = tmp_path / f"{when}-{style}"
            more = ["--system", system] if system else []
            flags = ["--eval-only", "--eval-count", "12", *words, *more, "--out", str(out)]
            assert train.main(flags) == 0
            summary = json.loads((out / "summary.json").read_text())
            pair = found["asked"][style]
            assert pair["greedy"][when]["strict"] == summary["strict"]
            assert pair["T = 1"][when]["lenient"] == summary["sampled_lenient"]
    for style in ("careful", "hasty", "guess"):
        assert found["asked"][style]["greedy"]["before"][style] == 1
    assert found["asked"]["plain"]["greedy"]["before"]["guess"] > 0.5
    assert found["asked"]["plain"]["greedy"]["after"]["careful"] > 0.7
    change = found["loss"]["guess, answers"]
    assert change["after"] > change["before"] + 0.3 and 0 < change["error"] < 0.3
    capsys.readouterr()


def test_other_models_and_other_methods(tmp_path, capsys, monkeypatch):
    """A LoRA's folder; a fully trained model is its own folder, sampled to the same limit."""
    model = transformer.load(TOY)
    params = lora.adapt(model)
    with torch.no_grad():
        for p in params:
            p.add_(0.02)
    lora.save(tmp_path / "lora", model)
    found = measured(tmp_path, tmp_path / "lora", "--count", "4")
    assert found["loss"]["plain, answers"]["after"] != found["loss"]["plain, answers"]["before"]
    whole = transformer.load(TOY)
    lora.save_model(tmp_path / "full", whole.state_dict(), TOY, "fp32")
    inner = opened.opened
    limits = []

    def noted(args, count):
        limits.append(args.max_new_tokens)
        return inner(args, count)
    monkeypatch.setattr(opened, "opened", noted)
    found = measured(tmp_path, tmp_path / "full", "--count", "4")
    assert limits == [96, 96]  # toy/tinylora.json's; the other folder brings none
    assert all(x["before"] == x["after"] for x in found["loss"].values())
    for modes in found["asked"].values():
        assert all(pair["before"] == pair["after"] for pair in modes.values())

    base = write_folder(tmp_path / "base", tiny(vocab=576))
    other = transformer.load(base)
    v = tinylora.adapt(other, 13)
    with torch.no_grad():
        v.fill_(0.5)
    tinylora.save(tmp_path / "a.safetensors", v, other)
    (tmp_path / "prose.txt").write_text("Once upon a time there was a number.\n" * 400)
    words = [tmp_path / "a.safetensors", "--model", base, "--text", tmp_path / "prose.txt"]
    found = measured(tmp_path, *words)
    assert list(found["loss"]) == [f"prose, {tmp_path / 'prose.txt'}"] and found["asked"] == {}
    change = found["loss"][f"prose, {tmp_path / 'prose.txt'}"]
    ids = []
    text = (tmp_path / "prose.txt").read_text()
    chat = Chat(base)
    for start in range(0, len(text), 4000):
        ids += chat.encode(text[start:start + 4000])
    assert change["tokens"] == len(ids) - change["texts"] and change["texts"] == -(-len(ids) // 256)
    assert change["before"] != change["after"]
    capsys.readouterr()


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    base = write_folder(tmp_path / "base", tiny(vocab=576))
    (tmp_path / "empty.txt").write_text("")
    for words, message in (([ADAPTER, "--model", base], "nothing to measure"),
                           (["nowhere"], "nowhere: no such file or folder"),
                           ([ADAPTER, "--model", base, "--text", ROOT / "LICENSE"],
                            "another base model"),
                           ([ADAPTER, "--text", tmp_path / "empty.txt"], "holds no text"),
                           ([ADAPTER, "--text", tmp_path / "gone.txt"], "gone.txt: no such file")):
        assert forgetting.main([str(word) for word in words]) == 2
        one_error(capsys, message)
