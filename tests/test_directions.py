"""--directions: which singular triplets an adapter uses, in its file, in both engines, exported."""
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import TINY_RUN, TOY, one_error, random_v, tiny, write_folder

import fast
import model as transformer
import tinylora
import train
from methods import lora
from support import directions
from support.errors import InputError
from tools import export, sweep_file

OTHERS = directions.KINDS[1:]
IDS = torch.arange(20)[None]


def layers(model):
    return [m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]


def places(kind, count, rank, seed, index):
    """Which triplets, said in other words than the program's."""
    order = list(range(count))
    if kind == "random":
        stream = np.random.RandomState([8, seed, index, 0])
        return sorted(stream.permutation(count)[:rank])
    before = {"top": 0, "middle": (count - rank) // 2, "bottom": count - rank}[kind]
    return order[before:before + rank]


@pytest.mark.parametrize("method", ["tinylora", "lora-xs"])
@pytest.mark.parametrize("kind", directions.KINDS)
def test_the_formula_with_other_triplets(kind, method):
    """U S R V^T with those of torch's SVD at the places named; both for tall and for wide weights,
    which have as many triplets as their shorter side."""
    model = tiny()
    v = random_v(tinylora.adapt(model, rank=3, seed=5, method=method, directions=kind))
    for index, layer in enumerate(layers(model)):
        W = layer.base.weight
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        at = places(kind, min(W.shape), 3, 5, index)
        sign = torch.where(U[:, at].sum(0) < 0, -1.0, 1.0)
        R = v[index].view(3, 3) if method == "lora-xs" else layer.R()
        change = (U[:, at] * sign) @ torch.diag(S[at]) @ R @ (Vt[at] * sign[:, None])
        torch.testing.assert_close(layer.US @ R @ layer.Vt, change, atol=1e-4, rtol=1e-4)
        x = torch.randn(4, W.shape[1])
        torch.testing.assert_close(layer(x), layer.base(x) + x @ change.T, atol=1e-3, rtol=1e-4)


def test_the_middle_and_the_bottom_are_where_they_are_said_to_be():
    factors = (torch.eye(9), torch.arange(9.0).flip(0), torch.eye(9), 0.5)
    want = {"middle": [5.0, 4.0], "bottom": [1.0, 0.0]}
    for kind, S in want.items():
        assert directions.pick(factors, kind, 2, 0, 0)[1].tolist() == S
    assert directions.pick(factors, "bottom", 2, 0, 0)[3] == 0.5
    chosen = {tuple(directions.pick(factors, "random", 2, seed, index)[1].tolist())
              for seed in range(4) for index in range(4)}
    assert len(chosen) > 10 and all(a > b for a, b in chosen)  # descending, as S is


@torch.no_grad()
@pytest.mark.parametrize("kind", directions.KINDS)
def test_both_engines_have_the_same(kind):
    """Also where Lanczos could work (a side of 150), and where neighbours are nearly equal: all
    triplets come from one solver. The top ones up to rounding."""
    found = []
    for svd in (tinylora.svd, fast.svd):
        model = tiny(hidden=160, mid=300, heads=10, kv=10, head_dim=16)
        v = random_v(tinylora.adapt(model, 13, svd=svd, directions=kind))
        found.append([x for m in layers(model) for x in (m.US, m.Vt)] + [v])
    for x, y in zip(*found):
        assert kind == "top" or torch.equal(x, y)
        torch.testing.assert_close(x, y, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("method", ["tinylora", "lora-xs"])
def test_a_file_says_it_and_load_obeys(kind, method, tmp_path):
    model = tiny()
    v = random_v(tinylora.adapt(model, seed=3, method=method, directions=kind))
    path = tmp_path / "a.safetensors"
    tinylora.save(path, v, model)
    with safe_open(path, "pt") as file:
        assert file.metadata()["directions"] == kind
    assert tinylora.read(path)[1]["directions"] == kind
    other = tiny()
    assert torch.equal(tinylora.load(path, other, fast.svd), v)
    assert other.adapter == model.adapter
    assert torch.equal(other(IDS), model(IDS))
    top = tiny()
    random_v(tinylora.adapt(top, seed=3, method=method))
    assert (top(IDS) - model(IDS)).abs().max() > 1e-3
    with pytest.raises(InputError, match=f"directions is {kind} in the file and top here"):
        tinylora.load(path, top)
    tinylora.save(path, v, top)
    with pytest.raises(InputError, match=f"directions is top in the file and {kind} here"):
        tinylora.load(path, other)


def test_top_leaves_no_trace(tmp_path):
    """Files and config.json are those of before there was a choice; one that says top loads."""
    model = tiny()
    v = random_v(tinylora.adapt(model, 13, directions="top"))
    assert "directions" not in model.adapter
    path = tmp_path / "a.safetensors"
    tinylora.save(path, v, model)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert "directions" not in metadata and "directions" not in tinylora.read(path)[1]
    save_file({"v": v.detach().flatten()}, path, metadata | {"directions": "top"})
    other = tiny()
    assert torch.equal(tinylora.load(path, other), v) and other.adapter == model.adapter
    assert torch.equal(tinylora.load(path, model), v)
    save_file({"v": v.detach().flatten()}, path, metadata | {"directions": "left"})
    with pytest.raises(InputError, match="its metadata says .*, left directions"):
        tinylora.load(path, tiny())


def test_flags(tmp_path, capsys):
    """A value that is none, methods without an SVD, an evaluation, a file made with another."""
    for words, message in ((["--directions", "left"], "invalid choice: 'left'"),
                           (["--directions", "top", "--method", "lora"],
                            "--directions means nothing to --method lora"),
                           (["--directions", "top", "--method", "full"],
                            "--directions means nothing to --method full"),
                           (["--directions", "top", "--eval-only"],
                            "--directions means nothing to --eval-only")):
        assert train.main([*words, "--out", str(tmp_path / "none")]) == 2
        one_error(capsys, message)
    adapters = {}
    for kind in ("top", "bottom"):
        model = transformer.load(TOY)
        adapters[kind] = tmp_path / kind
        tinylora.save(adapters[kind], tinylora.adapt(model, 13, directions=kind), model)
    for made, asked in (("top", "bottom"), ("bottom", "top")):
        words = ["--adapter", str(adapters[made]), "--directions", asked, *TINY_RUN]
        assert train.main([*words, "--out", str(tmp_path / f"not-{made}")]) == 2
        one_error(capsys, f"--directions {asked}", f"was made with {made}")


def test_a_run_trains_evaluates_and_resumes(tmp_path, capsys):
    """What is trained is what the file gives back, at the same scores, in both engines."""
    out = tmp_path / "run"
    words = ["--params", "13", "--directions", "middle", "--lr", "0.5", *TINY_RUN,
             "--prompts", "8", "--max-new-tokens", "64"]
    assert train.main([*words, "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["directions"] == config["trained"]["directions"] == "middle"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["final_format"] != summary["base_format"]
    adapter = str(out / "adapter.safetensors")
    for engine in ("fast", "plain"):
        again = tmp_path / engine
        flags = ["--eval-only", "--adapter", adapter, "--eval-count", "8", "--engine", engine]
        assert train.main([*flags, "--max-new-tokens", "64", "--out", str(again)]) == 0
        found = json.loads((again / "summary.json").read_text())
        assert (found["format"], found["sampled"]) == (
            summary["final_format"], summary["final_sampled"])
    v = load_file(adapter)["v"]
    assert train.main(["--resume", str(out), "--steps", "3"]) == 0
    assert not torch.equal(load_file(adapter)["v"], v)
    assert tinylora.read(adapter)[1]["directions"] == "middle"
    capsys.readouterr()


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHERS)
def test_exports_are_exact(kind, tmp_path, capsys):
    """The same logits as a LoRA and as a whole model; both say which directions they have."""
    base = write_folder(tmp_path / "base", tiny())
    model = transformer.load(base)
    path = tmp_path / "adapter.safetensors"
    v = random_v(tinylora.adapt(model, 13, directions=kind))
    tinylora.save(path, v, model, name=str(base))
    for form in ("peft", "merged"):
        out = tmp_path / form
        assert export.main(["export", str(path), "--to", form, "--out", str(out)]) == 0
        assert f"2 singular directions ({kind})" in (out / "README.md").read_text()
    plain = transformer.load(base)
    lora.load(tmp_path / "peft", plain)
    bare = transformer.load(base)
    assert (bare(IDS) - model(IDS)).abs().max() > 1e-3
    torch.testing.assert_close(plain(IDS), model(IDS), atol=1e-4, rtol=1e-4)
    merged = transformer.load(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS), model(IDS), atol=1e-4, rtol=1e-4)
    capsys.readouterr()
    assert export.main(["show", str(path)]) == 0
    assert f"SVD of rank 2 ({kind} directions)" in capsys.readouterr().out


def test_a_sweeps_older_runs_keep_their_keys():
    """A flag that did not exist then, left alone, makes no other run of them."""
    spec = {"flags": {}, "validation": "toy"}
    plain, middle = (sweep_file.prepare(spec, {"flags": {"params": 13} | more}, None)["test"][1]
                     for more in ({}, {"directions": "middle"}))
    assert "directions" not in plain and middle == plain | {"directions": "middle"}
