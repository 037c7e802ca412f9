"""tools/export.py and tools/card.py: what an adapter is, and what becomes of it elsewhere."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from helpers import ROOT, TOY, needs, one_error, random_v, tiny, write_folder

import model as transformer
import tinylora
from methods import lora
from tools import card, export

ADAPTER = ROOT / "results" / "toy-seed0" / "adapter.safetensors"


def command(*words, cwd, module=True):
    """python -m tools.export, or the file itself, from the folder `cwd`."""
    program = ["-m", "tools.export"] if module else [str(ROOT / "tools" / "export.py")]
    return subprocess.run([sys.executable, *program, *map(str, words)], cwd=cwd,
                          capture_output=True, text=True)


def modes(folder):
    return {path.stat().st_mode for path in folder.iterdir()}


@pytest.fixture
def new_mode(tmp_path):
    """The mode that any new file gets."""
    (tmp_path / "new").touch()
    return (tmp_path / "new").stat().st_mode


def adapter_for(tmp_path, model, base, dtype="fp32", **kw):
    v = random_v(tinylora.adapt(model, **kw), 0.2)
    path = tmp_path / "adapter.safetensors"
    tinylora.save(path, v, model, dtype, base)
    return path


# ------------------------------------------------------------------------------------------- show

def test_show_says_what_an_adapter_is(tmp_path, capsys):
    """Numbers, bytes, how it is rebuilt, the base and v; no model is read for it."""
    model = tiny()
    path = adapter_for(tmp_path, model, "owner/base", "bf16", params=13, seed=5)
    assert export.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("13 trained numbers in bf16: 26 bytes", "13 tiled ties x u 1", "rank 2",
                  "seed 5", "'owner/base'", model.adapter["base"][:12]):
        assert words in out
    v = model.layers[0].mlp.up_proj.v.detach().bfloat16().flatten().tolist()
    assert out.split(": ")[-1].split() == [f"{x:+.4g}" for x in v]
    path = adapter_for(tmp_path, tiny(), "", method="lora-xs")
    assert export.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "R = v" in out and "not named" in out and out.rstrip().endswith("...")


def test_show_of_a_lora(tmp_path, capsys):
    model = tiny()
    lora.adapt(model, rank=3)
    lora.save(tmp_path / "lora", model, base="owner/base")
    assert export.main(["show", str(tmp_path / "lora")]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("rank 3", "alpha 32", "'owner/base'")), out


def test_what_a_file_says_is_not_obeyed(tmp_path, capsys):
    """Line breaks and terminal codes in an adapter's hint."""
    path = adapter_for(tmp_path, tiny(), "a\x1b[31m\nb", params=13)
    assert export.main(["show", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    flags = ["export", str(path), "--to", "peft", "--out", str(tmp_path / "new")]
    assert export.main(flags) == 2
    one_error(capsys, "--model")


# ----------------------------------------------------------------------------------------- export

def test_peft_export(tmp_path, capsys, new_mode):
    """The folder names its base in a way that holds anywhere, has the tokenizer and a card, and
    its weights may be read by whom the rest may be read; 52 bytes have become how many?"""
    out = tmp_path / "lora"
    assert export.main(["export", str(ADAPTER), "--to", "peft", "--out", str(out)]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(TOY)
    assert config["r"] == config["lora_alpha"] == 16
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json"}
    assert modes(out) == {new_mode}
    text = capsys.readouterr().out
    size = (out / "adapter_model.safetensors").stat().st_size
    assert f"13 numbers, 52 bytes, have become {size / 1000:.1f} kB" in text
    model = transformer.load(TOY)
    tinylora.load(ADAPTER, model)
    plain = transformer.load(TOY)
    lora.load(out, plain)
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(plain(ids), model(ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_merged_export(tmp_path, capsys, new_mode):
    """The same logits, with the type of the base's weights unless another is asked for."""
    out = tmp_path / "merged"
    assert export.main(["export", str(ADAPTER), "--to", "merged", "--out", str(out)]) == 0
    assert modes(out) == {new_mode}
    assert "3.5 MB" in capsys.readouterr().out
    assert not (out / "tinylora.json").exists() and (out / "generation_config.json").exists()
    model = transformer.load(TOY)
    tinylora.load(ADAPTER, model)
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(transformer.load(out)(ids), model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("field,value,want", [
    ("torch_dtype", "bfloat16", torch.bfloat16), ("dtype", "float16", torch.float16),
    ("dtype", "torch.bfloat16", torch.bfloat16), (None, None, torch.float32),
    ("dtype", "int8", torch.float32), ("dtype", 3, torch.float32)])
def test_merged_has_the_bases_type(field, value, want, tmp_path):
    """In fp32 the export of a bf16 model would be twice its size."""
    base = write_folder(tmp_path / "base", tiny())
    if field:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {field: value}))
    path = adapter_for(tmp_path, tiny(), str(base), params=13)
    out = tmp_path / "out"
    assert export.main(["export", str(path), "--to", "merged", "--out", str(out)]) == 0
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {want}
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == str(want).removeprefix("torch.") and "dtype" not in config


def test_what_bf16_destroys_is_told(tmp_path, capsys):
    """The report's two figures are those of plain arithmetic on the files."""
    base = write_folder(tmp_path / "base", tiny(dtype=torch.bfloat16))
    path = adapter_for(tmp_path, transformer.load(base), str(base), params=13)
    for dtype in ("fp32", "bf16"):
        flags = ["--to", "merged", "--dtype", dtype, "--out", str(tmp_path / dtype)]
        assert export.main(["export", str(path), *flags]) == 0
    report = capsys.readouterr().out
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "fp32", "bf16")]
    before, exact, rounded = files
    assert set(before) == set(exact) == set(rounded)
    changed = [name for name in before if not torch.equal(before[name].float(), exact[name])]
    assert len(changed) == 14
    wish = torch.cat([(exact[n] - before[n].float()).flatten() for n in changed]).double()
    got = torch.cat([(rounded[n].float() - before[n].float()).flatten() for n in changed]).double()
    lost = ((got - wish).norm() / wish.norm()).item()
    unchanged = ((got == 0) & (wish != 0)).double().mean().item()
    assert f"off by {lost:.1%}" in report and f"left {unchanged:.1%}" in report


def test_export_from_another_folder(tmp_path):
    """The adapter's hint is a path as the project's folder has it ("toy"); no flag was given, so
    none may be blamed."""
    shutil.copy(ADAPTER, tmp_path / "a.safetensors")
    done = command("export", "a.safetensors", "--to", "peft", "--out", "lora", cwd=tmp_path,
                   module=False)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(TOY)
    done = command("show", "a.safetensors", cwd=tmp_path, module=False)
    assert done.returncode == 0 and done.stdout.startswith("a.safetensors: tinylora, 13 trained")
    done = command("show", ADAPTER, cwd=ROOT)
    assert done.returncode == 0
    old = subprocess.run([sys.executable, str(ROOT / "tinylora.py"), "show", str(ADAPTER)],
                         capture_output=True, text=True)
    assert old.returncode and "python -m tools.export" in old.stderr
    assert old.stderr.count("\n") == 1


def test_a_base_that_is_gone(tmp_path, capsys, monkeypatch):
    """Its file names a folder of another machine: the message says which flag to give."""
    monkeypatch.chdir(tmp_path)
    base = write_folder(tmp_path / "base", tiny())
    for i, hint in enumerate(("nowhere", "../gone/model", "owner/name")):
        path = adapter_for(tmp_path, tiny(), hint, params=13)
        flags = ["export", str(path), "--to", "peft", "--out", f"new{i}"]
        assert export.main(flags) == 2
        one_error(capsys, str(path), repr(hint), "--model")
        assert not (tmp_path / f"new{i}").exists()
        assert export.main([*flags, "--model", str(base)]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("flags", [
    [], ["--to", "peft"], ["--out", "x"], ["--to", "gguf", "--out", "x"],
    ["--to", "peft", "--out", str(TOY)], ["--to", "merged", "--out", "/proc/x"],
    ["--to", "peft", "--out", "adapter.safetensors"],
    ["--to", "peft", "--out", "new", "--dtype", "int8"],
    ["--to", "peft", "--out", "new", "--model", "nowhere"],
    ["--to", "peft", "--out", "new", "--model", str(TOY)]], ids=" ".join)
def test_mistakes_end_in_one_line(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = write_folder(tmp_path / "base", tiny())
    adapter_for(tmp_path, tiny(), str(base), params=13)
    assert export.main(["export", "adapter.safetensors", *flags]) == 2
    one_error(capsys)
    assert not (tmp_path / "new").exists()


def test_what_is_no_adapter_ends_in_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    model = tiny()
    lora.adapt(model)
    lora.save(tmp_path / "lora", model)
    unnamed = adapter_for(tmp_path, tiny(), "", params=13)
    cases = ((tmp_path / "pipe", "pipe"), (tmp_path / "empty", "adapter_config.json"),
             (tmp_path / "lora", "a LoRA in PEFT's format already"), (unnamed, "--model"),
             (tmp_path / "nowhere", "nowhere"), (TOY / "model.safetensors", "not a TinyLoRA"))
    for path, words in cases:
        flags = ["--to", "peft", "--out", str(tmp_path / "new")]
        assert export.main(["export", str(path), *flags]) == 2
        one_error(capsys, words)
    for path in (tmp_path / "pipe", tmp_path / "empty", TOY / "model.safetensors"):
        assert export.main(["show", str(path)]) == 2
        one_error(capsys)
    for words in ([], ["sing"], ["show"]):
        assert export.main(words) == 2
        one_error(capsys, "--help")


def test_sizes_are_told_in_words():
    assert [export.size(n) for n in (26, 2_480_000, 999_950_000, 15_231_233_024)] == [
        "26 bytes", "2.5 MB", "1000.0 MB", "15.2 GB"]


@needs("peft", "transformers")
@torch.no_grad()
def test_a_lora_finds_its_base_from_anywhere(tmp_path, monkeypatch):
    """--model as a relative path; then PEFT loads the folder alone, in another working directory,
    and transformers its tokenizer. (PEFT widens a table that is too small for the tokenizer.)"""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer
    monkeypatch.chdir(tmp_path)
    model = tiny(vocab=576)
    write_folder(tmp_path / "base", model)
    path = adapter_for(tmp_path, model, "", params=13)
    flags = ["--to", "peft", "--out", "lora", "--model", "base"]
    assert export.main(["export", str(path), *flags]) == 0
    monkeypatch.chdir("/")
    ids = torch.arange(20)[None]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lora")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, model(ids), atol=1e-3, rtol=0)
    assert tokenizer.eos_token == "<|im_end|>"


# ------------------------------------------------------------------------------------- model card

@needs("peft", "transformers")
@torch.no_grad()
def test_a_cards_code_runs(tmp_path):
    """What README.md says about loading it, as it stands there."""
    model = tiny()
    base = write_folder(tmp_path / "base", model)
    path = adapter_for(tmp_path, model, str(base), params=13)
    ids = torch.arange(20)[None]
    for form in ("peft", "merged"):
        out = tmp_path / form
        assert export.main(["export", str(path), "--to", form, "--out", str(out)]) == 0
        code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
        names = {}
        exec(code, names)
        torch.testing.assert_close(names["model"](ids).logits.float(), model(ids), atol=1e-3,
                                   rtol=0)


def test_a_card_says_what_there_is(tmp_path, capsys):
    """Base, method, numbers, how it is loaded; the scores if a run's summary lies beside it."""
    run = json.loads((ADAPTER.parent / "summary.json").read_text())
    for form, loads in (("peft", "PeftModel.from_pretrained"), ("merged", "AutoModelForCausalLM")):
        out = tmp_path / form
        assert export.main(["export", str(ADAPTER), "--to", form, "--out", str(out)]) == 0
        text = (out / "README.md").read_text()
        for words in (str(TOY), "TinyLoRA", "13 trained numbers (52 bytes)", loads, str(out),
                      "500 held-out problems of `toy`",
                      f"| strict, greedy | 0.142 +- 0.016 | {run['final_strict']:.3f} +- ",
                      f"| strict, T = 1 | 0.326 +- 0.021 | {run['final_sampled']:.3f} +- ",
                      "| lenient, T = 1 |"):
            assert words in text, words
    base = write_folder(tmp_path / "base", tiny())
    path = adapter_for(tmp_path, tiny(), str(base), method="lora-xs")
    flags = ["--to", "peft", "--out", str(tmp_path / "xs")]
    assert export.main(["export", str(path), *flags]) == 0
    text = (tmp_path / "xs" / "README.md").read_text()
    assert "LoRA-XS" in text and "held-out" not in text


@pytest.mark.parametrize("summary", [
    "", "[]", "{}", '{"final_strict": 1}', '{"final_strict": "x", "base_strict": 0.1}',
    '{"final_strict": 0.5, "base_strict": 0.1, "eval_count": 0}',
    '{"final_strict": 0.5, "base_strict": 0.1, "eval_count": null}'])
def test_a_summary_that_is_none_gives_no_table(summary, tmp_path):
    (tmp_path / "summary.json").write_text(summary)
    assert card.scores_table(tmp_path / "summary.json") == []


def test_any_names_of_scores(tmp_path):
    """A task's first score is the one whose sampled mean is called "sampled"."""
    (tmp_path / "summary.json").write_text(json.dumps(
        {"eval_count": 4, "data": "d", "base_share": 2.5, "final_share": 3, "base_hit": 0.0,
         "final_hit": 1.0, "base_sampled": 1.5, "final_sampled": 2.0, "base_sampled_hit": 0.0,
         "final_sampled_hit": 0.5}))
    lines = card.scores_table(tmp_path / "summary.json")
    assert [line.split(" | ")[0] for line in lines[4:-1]] == [
        "| share, greedy", "| hit, greedy", "| share, T = 1", "| hit, T = 1"]
    assert "| share, greedy | 2.500 +- 0.000 | 3.000 +- 0.000 |" in lines
