"""model.py: the cache on every kind of model, and model folders, good and broken ones."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import MODELS, TOY, one_error, tiny, write_folder

import model as transformer
import train
from support.errors import InputError


@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_cache_gives_the_numbers_of_one_pass(kw):
    """Bugs 2, 17, 18, 19: rows of unequal length in the cache, in pieces of unequal length (some
    empty, once a row has ended), give the logits of each row alone."""
    model = tiny(dtype=torch.float64, **kw)  # exact enough to tell a wrong number from rounding
    sizes = (11, 7, 9, 1)
    rows = [np.random.RandomState(n).randint(0, 50, n).tolist() for n in sizes]
    rows[1][3] = 0  # padding's id, here a real token
    whole = [model(torch.tensor([row]))[0] for row in rows]
    cache = transformer.Cache(model, 4, 30)
    done = [0, 0, 0, 0]
    for width in (6, 3, 1, 1):
        parts = [row[d:d + width - i % 2] for i, (row, d) in enumerate(zip(rows, done))]
        lengths = torch.tensor([len(part) for part in parts])
        got = model(transformer.pad(parts, "cpu"), cache, lengths)
        for i, part in enumerate(parts):
            want = whole[i][done[i]:done[i] + len(part)]
            torch.testing.assert_close(got[i, :len(part)], want, atol=1e-11, rtol=1e-11)
            done[i] += len(part)
    assert cache.lengths.tolist() == done and done[0] == 11


@pytest.mark.parametrize("kw", [dict(), dict(heads=7, kv=1, head_dim=6)], ids=str)
def test_rows_of_a_group_continue_their_prompt(kw):
    """Bugs 2, 19: after `repeat`, each row continues the right prompt, whatever its length."""
    model = tiny(dtype=torch.float64, **kw)
    prompts = [[1, 2, 3], [4], [5, 6]]
    cache = transformer.Cache(model, 3, 3)
    model(transformer.pad(prompts, "cpu"), cache, torch.tensor([3, 1, 2]))
    cache.repeat(2, 4)
    new = np.random.RandomState(0).randint(0, 50, (6, 4))
    got = torch.cat([model(torch.tensor(new[:, t:t + 1]), cache) for t in range(4)], 1)
    for i in range(6):
        text = torch.tensor([prompts[i // 2] + new[i].tolist()])
        torch.testing.assert_close(got[i], model(text)[0, -4:], atol=1e-11, rtol=1e-11)


def test_log_softmax_is_fp32():
    """Bug 13: bf16 logits are normalised in fp32."""
    x = torch.randn(4, 1000).bfloat16()
    got = transformer.log_softmax(x, 0.5)
    assert got.dtype == torch.float32
    want = (x.double() / 0.5).log_softmax(-1)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_load_reads_back_what_was_saved(shards, tied, tmp_path):
    """One file or several, head tied or not: the file's weights, in the dtype asked for, frozen."""
    model = tiny(tied=tied)
    folder = write_folder(tmp_path, model, shards)
    ids = torch.arange(10)[None]
    assert torch.equal(transformer.load(folder)(ids), model(ids))
    half = transformer.load(folder, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.rope_freqs.dtype == torch.float32  # rounded, far positions would be wrong
    assert not any(p.requires_grad for p in half.parameters())


def test_a_loaded_model_does_not_depend_on_its_file(tmp_path):
    """Weights in a memory-mapped file would change, or crash the run, with the file."""
    folder = write_folder(tmp_path, tiny())
    model = transformer.load(folder)
    before = model.embed_tokens.weight.clone()
    with open(folder / "model.safetensors", "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(model.embed_tokens.weight, before)


def edit_config(**changes):
    def edit(folder):
        raw = json.loads((folder / "config.json").read_text()) | changes
        raw = {name: x for name, x in raw.items() if x != "delete"}
        (folder / "config.json").write_text(json.dumps(raw))
    return edit


def edit_weights(**changes):
    """Replace tensors of the file, or remove them (None)."""
    def edit(folder):
        state = load_file(folder / "model.safetensors")
        for name, x in changes.items():
            state.pop(f"model.{name}", None)
            if x is not None:
                state[f"model.{name}"] = x
        save_file(state, folder / "model.safetensors")
    return edit


BROKEN = {  # what is done to the folder, words of the message
    "no folder": (shutil.rmtree, ["--model", "no such folder"]),
    "unknown architecture": (edit_config(model_type="gpt2"), ["model_type", "gpt2"]),
    "missing field": (edit_config(hidden_size="delete"), ["hidden_size"]),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), ["damaged"]),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), ["damaged"]),
    "wrong shape": (edit_config(intermediate_size=40), ["mlp", "shape"]),
    "missing tensor": (edit_weights(**{"norm.weight": None}), ["norm.weight"]),
    "foreign tensor": (edit_weights(extra=torch.zeros(2)), ["extra"]),
    "integer weights": (edit_weights(**{"norm.weight": torch.ones(32, dtype=torch.int8)}),
                        ["norm.weight", "quantised"]),
    "a small table": (edit_weights(**{"embed_tokens.weight": torch.zeros(50, 32)}),
                      ["embed_tokens", "shape"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "no template": (lambda f: (f / "tokenizer_config.json").write_text("{}"), ["chat_template"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_model_folders_are_told_in_one_line(name, tmp_path, capsys):
    """A traceback, or a message that does not name the file and the field."""
    folder = write_folder(tmp_path / "m", tiny(vocab=600))
    damage, words = BROKEN[name]
    damage(folder)
    flags = ["--model", str(folder), "--data", str(TOY), "--eval-count", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "out")]) == 2
    one_error(capsys, *words)


def test_a_table_smaller_than_the_tokenizer_is_refused(tmp_path, capsys):
    """The opposite of bug 20: an id without a row in the table would end in an IndexError."""
    folder = write_folder(tmp_path / "m", tiny(vocab=50))
    flags = ["--model", str(folder), "--data", str(TOY), "--eval-count", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "out")]) == 2
    one_error(capsys, "token ids", "50 rows")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_folder(tmp_path, tiny(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00003"):
        transformer.load(folder)
