"""python -m pytest -q        Each test's docstring names the bug it guards; numbers like (bug 8) are this project's list:

1 stop token masked out  2 mask from ids != pad  3 one stop id only  4 text after the stop scored  5 one first token for the
whole group  6 temperature missing in the trainer  7 truncated sampler, full trainer  8 mean of micro-batch means  9 masks
changed in place  10 1/|o| bias, empty masks  11 groups of equal rewards, groups of 1  12 metrics diluted by padding  13 log-softmax
in bf16  14 bf16 trainables  15 merge drift  16 zero gradient  17 is_causal with a cache  18 grouped queries and masks  19 padding
without positions  20 ids beyond the tokenizer  21 Qwen's details  22 zero-probability tokens  23 answers  24 evaluation noise
"""
import errno
import functools
import http.server
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # the tests are the CPU's, and ask no hub; before the imports

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import chat
import export
import graph
import grpo
import gsm8k
import lora
import model as transformer
import tinylora
import train
from cache import Cache
from files import Config, InputError
from model import Transformer

ROOT = Path(__file__).resolve().parent
TOY = ROOT / "toy"
ASSETS = Path(os.environ.get("TINYLORA_ASSETS") or "/nonexistent")
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="needs the data folder named by TINYLORA_ASSETS")
needs_transformers = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers (requirements-dev.txt)")

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SHAPES = {"toy": (4, 128, 384, 4, 2), "0.5B": (24, 896, 4864, 14, 2), "3B": (36, 2048, 11008, 16, 2), "7B": (28, 3584, 18944, 28, 4)}


def config(kind="qwen2", layers=2, hidden=32, mid=48, heads=4, kv=2, head_dim=8, vocab=50, theta=10000.0, tied=True, scaling=None):
    return Config(kind, vocab, hidden, mid, layers, heads, kv, head_dim, 1e-6, theta, scaling, tied)


@torch.no_grad()
def tiny(seed=0, dtype=torch.float32, **kw):
    """A random model; norm weights and biases are random too, or their bugs would not show (bug 21)."""
    model, rng = Transformer(config(**kw)), np.random.RandomState(seed)
    for name, p in model.named_parameters():
        p.copy_(torch.from_numpy(rng.standard_normal(p.shape)) * (0.3 if p.dim() == 2 else 0.5) + (1.0 if "norm" in name else 0.0))
    return model.to(dtype).requires_grad_(False).eval()


def write_folder(folder, model, shards=1):
    """A model folder in Hugging Face layout, with the toy's tokenizer files."""
    c = model.config
    raw = {"model_type": c.model_type, "architectures": ["Qwen2ForCausalLM"], "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
           "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers, "hidden_act": "silu",
           "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
           "attention_bias": False, "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tie_word_embeddings}
    if c.rope_scaling:
        raw["rope_scaling"] = {"rope_type": "llama3"} | c.rope_scaling
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOY / name, folder / name)
    state = {n if n.startswith("lm_head") else "model." + n: p.detach().clone() for n, p in model.state_dict().items()}
    names = sorted(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: state[n] for n in names[i::shards]}, folder / file)
        index |= {n: file for n in names[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def random_v(v, scale=0.3, seed=0):
    with torch.no_grad():
        v.copy_(torch.from_numpy(np.random.RandomState(seed).standard_normal(v.shape)) * scale)
    return v


def rollout(model, prompts=([1, 2, 3, 4, 5], [6, 7, 8], [9, 10]), group=4, length=12, temperature=1.0, stops=(0, 3), seed=0, **kw):
    noise = np.random.RandomState(seed).random_sample((len(prompts) * group, length))
    ids, mask, logp = grpo.generate(model, list(prompts), group, length, stops, temperature, noise, **kw)
    return [p for p in prompts for _ in range(group)], ids, mask, logp


# ---------------------------------------------------------------------------------------------------- model.py

MODELS = [dict(), dict(kv=4), dict(heads=7, kv=1, head_dim=6), dict(tied=False), dict(kind="llama", scaling=LLAMA3, theta=5e5), dict(theta=1e6, head_dim=16)]


@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_cache_gives_the_numbers_of_one_pass(kw):
    """Bugs 2, 17, 18, 19: ragged prompts through the cache, in chunks and token by token, equal each row alone."""
    model = tiny(dtype=torch.float64, **kw)  # exact enough to tell a wrong number from rounding
    rows = [list(np.random.RandomState(i).randint(0, 50, n)) for i, n in enumerate((11, 7, 9, 1))]
    rows[1][3] = 0  # 0 is also the padding's id: a mask made from ids would hide it
    whole = [model(torch.tensor([row]))[0] for row in rows]
    cache, lengths = Cache(model, 4, 30), torch.tensor([6, 3, 8, 1])
    got = model(grpo.pad([row[:n] for row, n in zip(rows, lengths)], "cpu"), cache, lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(got[i, :n], whole[i][:n], atol=1e-11, rtol=1e-11)
    done = lengths.tolist()
    for chunk in (2, 1, 1):  # chunks in the middle are ragged too: rows that have ended put in nothing
        part = [row[d:d + chunk] for row, d in zip(rows, done)]
        size = torch.tensor([len(p) for p in part])
        got = model(grpo.pad([p + [0] * (chunk - len(p)) for p in part], "cpu"), cache, size)
        for i in range(4):
            torch.testing.assert_close(got[i, :size[i]], whole[i][done[i]:done[i] + size[i]], atol=1e-11, rtol=1e-11)
        done = [d + len(p) for d, p in zip(done, part)]
    assert cache.lengths.tolist() == done


@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_rows_share_their_prompts_keys(kw):
    """Rows continue one prefill, full groups and ragged ones, in one token and in several, while some leave; no row touches another's keys. Where
    few rows a prompt are left, at once or in the end, they take copies of it."""
    model = tiny(dtype=torch.float64, **kw)  # exact enough to tell a wrong number from rounding
    prompts, rng, seen = [[1, 2, 3], [4], [5, 6], [7, 8, 9]], np.random.RandomState(0), set()

    def kind(cache):
        return "apart" if cache.prompt is None else "full groups" if cache.slots is None else "ragged"

    for rows in ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [0, 0, 0, 0, 0, 1, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 1, 3, 3], [2]):
        cache = Cache(model, 4, 5)
        model(grpo.pad(prompts, "cpu"), cache, torch.tensor([len(p) for p in prompts]))
        cache, texts = cache.share(torch.tensor(rows), 10), [list(prompts[i]) for i in rows]
        assert (kind(cache) == "apart") == (len(rows) < 8)
        for chunk, keep in ((1, None), (3, [0, 1, 2, 4, 5]), (1, [2, 3]), (2, None), (1, [1])):
            new = rng.randint(0, 50, (len(texts), chunk)).tolist()
            texts = [text + more for text, more in zip(texts, new)]
            got = model(torch.tensor(new), cache)
            for i, text in enumerate(texts):
                torch.testing.assert_close(got[i], model(torch.tensor([text]))[0, -chunk:], atol=1e-11, rtol=1e-11)
            if keep and max(keep) < len(texts):
                before, cache, texts = cache, cache.keep(torch.tensor(keep)), [texts[i] for i in keep]
                seen.add((kind(before), kind(cache)))
    ways = [("full groups", "ragged"), ("full groups", "apart"), ("ragged", "ragged"), ("ragged", "full groups"), ("ragged", "apart"), ("apart", "apart")]
    assert seen >= set(ways)


def test_linear_whichever_way_its_input_lies():
    """The CPU's other way round, for few rows and many, large weights and small, from inputs laid either way, with a bias and without."""
    rng = np.random.RandomState(0)
    for d_out in (700, 90):
        W, bias = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((d_out, 400), (d_out,)))
        for rows in (1, 2, 11, 12, 256, 257):
            x = torch.from_numpy(rng.standard_normal((rows, 400)))
            for laid in (x, x.T.contiguous().T):
                for b in (None, bias):
                    torch.testing.assert_close(transformer.linear(laid, W, b), x @ W.T + (0 if b is None else b), atol=1e-11, rtol=0)


@needs_transformers
def test_toy_folder_is_an_ordinary_qwen2_folder():
    """The toy loads in transformers as any Qwen2.5 folder does: same logits, same prompt ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    theirs, chat = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32), gsm8k.Chat(TOY)
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    for system in (None, "You are a careful assistant. You write down every step."):
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Tom has 5 apples." + gsm8k.INSTRUCTION}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat.prompt("Tom has 5 apples." + gsm8k.INSTRUCTION, system) == list(ids)
    ids = torch.tensor([chat.prompt("Tom has 5 apples.")])
    torch.testing.assert_close(transformer.load(TOY)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_load_reads_back_what_was_saved(shards, tied, tmp_path):
    """One file or many, tied or not: the weights are the file's, in the dtype asked for, frozen."""
    model = tiny(tied=tied)
    folder = write_folder(tmp_path, model, shards)
    ids = torch.arange(10)[None]
    assert torch.equal(transformer.load(folder)(ids), model(ids))
    half = transformer.load(folder, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.rope_freqs.dtype == torch.float32
    assert not any(p.requires_grad for p in half.parameters())


def edit_config(**changes):
    def edit(folder):
        raw = json.loads((folder / "config.json").read_text())
        raw |= changes
        (folder / "config.json").write_text(json.dumps({k: x for k, x in raw.items() if x != "delete"}))
    return edit


def edit_weights(change):
    def edit(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
    return edit


BROKEN = {  # name: (how, words the message must contain)
    "no folder": (lambda f: shutil.rmtree(f), ["--model", "no such folder"]),
    "no architecture": (edit_config(model_type="delete"), ["config.json", "model_type"]),
    "unknown architecture": (edit_config(model_type="gpt2"), ["model_type", "gpt2"]),
    "missing field": (edit_config(hidden_size="delete"), ["hidden_size"]),
    "negative size": (edit_config(num_hidden_layers=-3), ["num_hidden_layers"]),
    "heads do not divide": (edit_config(num_key_value_heads=3), ["num_key_value_heads"]),
    "quantised": (edit_config(quantization_config={"bits": 4}), ["quantization_config"]),
    "sliding window": (edit_config(use_sliding_window=True), ["use_sliding_window"]),
    "yarn": (edit_config(rope_scaling={"type": "yarn", "factor": 4.0}), ["yarn"]),
    "rope_scaling is text": (edit_config(rope_scaling="x"), ["rope_scaling"]),
    "another activation": (edit_config(hidden_act="gelu"), ["hidden_act"]),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "truncated shard": (lambda f: os.truncate(f / "model.safetensors", 5000), ["model.safetensors", "damaged"]),
    "empty shard": (lambda f: os.truncate(f / "model.safetensors", 0), ["model.safetensors", "damaged"]),
    "wrong shape": (edit_config(intermediate_size=40), ["mlp", "shape"]),
    "missing tensor": (edit_weights(lambda s: s.pop("model.norm.weight")), ["norm.weight"]),
    "foreign tensor": (edit_weights(lambda s: s.update(extra=torch.zeros(2))), ["extra"]),
    "integer weights": (edit_weights(lambda s: s.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})), ["norm.weight", "quantised"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "no template": (lambda f: (f / "tokenizer_config.json").write_text("{}"), ["chat_template"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_model_folders_are_told_in_one_line(name, tmp_path, capsys):
    """Each ends in exit code 2 and one line that names the file and the field."""
    folder = write_folder(tmp_path / "m", tiny(vocab=600))
    BROKEN[name][0](folder)
    assert train.main(["--model", str(folder), "--data", str(TOY), "--eval-count", "2", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("error: ") and all(word in message for word in BROKEN[name][1]), message


def test_a_missing_or_wandering_shard_is_named(tmp_path):
    """A shard the index names but the folder lacks, and one that points outside the folder."""
    folder = write_folder(tmp_path, tiny(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00003"):
        transformer.load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(InputError, match="own folder"):
        transformer.load(folder)


# ------------------------------------------------------------------------------------------------- tinylora.py

@pytest.mark.parametrize("shape", [(64, 64), (127, 400), (300, 8), (2, 2), (128, 200), (600, 500), (5000, 300), (200, 7000)])
def test_truncated_svd_equals_full_svd(shape):
    """Values to 1e-5, vectors up to the sign rule, the stated residual is the true one; also for nearly equal values.

    Up to 127 on the short side a full SVD is taken; the next two restart with few columns, the last two are multiplied in parts.
    """
    for seed, decay in ((0, 0.0), (1, 0.5), (2, 5.0)):
        W = torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()
        W = W * torch.exp(-decay * torch.arange(shape[1]) / 10)
        U, S, V, residual = tinylora.truncated_svd(W, 2)
        full = torch.linalg.svd(W.double(), full_matrices=False)
        torch.testing.assert_close(S.double(), full.S[:2], rtol=1e-5, atol=0)
        assert (U.double().T @ full.U[:, :2]).diag().abs().min() > 0.9999
        true = max((W.T @ U - V * S).norm(dim=0).max(), (W @ V - U * S).norm(dim=0).max()) / S[0]
        assert true <= 1.2 * residual + 3e-6 and residual <= 1e-5
        assert (residual > 0) == (min(shape) >= 128)  # a full SVD, which reports 0, would hide a loop that does not converge
        assert (U.double().sum(0) > 0).all() and torch.allclose(U.T @ U, torch.eye(2), atol=1e-5)


def test_truncated_svd_of_few_directions_and_of_too_fine_a_wish():
    """W of low rank: the basis soon holds all of it, and must stay orthonormal. Nothing converges to 1e-12 in fp32: then a full SVD it is."""
    for rank in (2, 5, 17, 30):
        rng = np.random.RandomState(rank)
        W = torch.from_numpy(rng.standard_normal((1200, rank)) @ rng.standard_normal((rank, 1200))).float()
        _, S, _, residual = tinylora.truncated_svd(W, 2)
        assert 0 < residual < 3e-6
        torch.testing.assert_close(S, torch.linalg.svdvals(W)[:2], rtol=3e-6, atol=0)
    W = W[:300, :200]
    _, S, _, residual = tinylora.truncated_svd(W, 2, tol=1e-12)
    assert residual == 0
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[:2])
    for W in (torch.zeros(300, 200), torch.ones(300, 200)):
        assert all(torch.as_tensor(x).isfinite().all() for x in tinylora.truncated_svd(W, 2))


def test_truncated_svd_sign_and_failures():
    """The signs follow the rule whichever way the solver turns; a rank that does not fit is an error; NaN is not a result."""
    for shape in ((300, 200), (50, 30)):
        W = torch.from_numpy(np.random.RandomState(0).standard_normal(shape)).float()
        U, S, V, _ = tinylora.truncated_svd(W, 2)
        U2, S2, V2, _ = tinylora.truncated_svd(W.flip(1), 2)  # the same U, another V, another path to both
        torch.testing.assert_close(U, U2, atol=1e-4, rtol=0)
        torch.testing.assert_close(V, V2.flip(0), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="--rank 31"):
        tinylora.truncated_svd(W, 31)
    model = tiny()
    model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(InputError, match="layer 1, mlp.up_proj: .*NaN"):
        tinylora.adapt(model, 13)


def test_the_svds_do_not_depend_on_the_number_of_threads():
    """Matrices large enough that one product is shared out among threads; afterwards, and after an error, torch has as many as before."""
    kept, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            kept.append([])
            for model in (transformer.load(TOY), tiny(heads=8, kv=8, head_dim=64, hidden=512, mid=1500, layers=1)):
                tinylora.adapt(model, 13)
                assert torch.get_num_threads() == threads
                kept[-1] += [t for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear) for t in (m.US, m.Vt)]
            model = tiny()
            model.layers[0].self_attn.k_proj.weight[0, 0] = math.inf
            with pytest.raises(InputError, match="layer 0, self_attn.k_proj"):
                tinylora.adapt(model, 13)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in kept[1:] for a, b in zip(kept[0], other, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_params_are_exact(name):
    """--params N trains exactly N numbers, on the toy and at Qwen2.5's shapes, with the group sizes the issue states."""
    layers, hidden, mid, heads, kv = SHAPES[name]
    modules = 7 * layers
    for n in (1, 2, 4, 7, 13, 25, 49, 64, 98, 196, 392, 504, 1000):
        with torch.device("meta"):
            model = Transformer(config(layers=layers, hidden=hidden, mid=mid, heads=heads, kv=kv, head_dim=hidden // heads, vocab=1000))
        model.requires_grad_(False)
        v = tinylora.adapt(model, params=n)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == v.numel() == n
        linears = [m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]
        assert len(linears) == modules
        group_of = [m.group for m in linears]
        groups = max(d for d in range(1, modules + 1) if n % d == 0)
        assert tuple(v.shape) == (groups, n // groups) and sorted(set(group_of)) == list(range(groups)) and group_of == sorted(group_of)
        sizes = [group_of.count(g) for g in range(groups)]
        tie = math.ceil(modules / groups)
        if math.ceil(modules / tie) == groups:
            assert sizes == [min(tie, modules - g * tie) for g in range(groups)]
        else:
            assert max(sizes) - min(sizes) <= 1
        if (name, n) == ("7B", 13):
            assert sizes == [16] * 12 + [4]


def test_tying_by_hand():
    """--n-tie, --u and --tie structured; wishes that contradict each other are errors."""
    assert tinylora.plan(28, n_tie=128)[0] == [0] * 128 + [1] * 68  # figure 1's point at 2 numbers
    row, groups, u, n_tie = tinylora.plan(28, n_tie=16, tie="structured")
    assert (groups, u, n_tie) == (14, 1, 16) and row[:7] == [0, 2, 4, 6, 8, 10, 12] and row[-7:] == [1, 3, 5, 7, 9, 11, 13]
    assert tinylora.plan(4, params=26, u=2)[1:3] == (13, 2) and tinylora.plan(4, params=13, u=13)[1:3] == (1, 13)
    assert tinylora.plan(4, n_tie=7, u=3)[1:3] == (4, 3) and tinylora.plan(4, params=12, n_tie=7)[1:3] == (4, 3)
    for bad in (dict(params=0), dict(params=13, tie="structured"), dict(params=13, u=2), dict(params=13, n_tie=7), dict(params=64, u=1)):
        with pytest.raises(InputError):
            tinylora.plan(4, **bad)


def test_zero_v_is_the_base_model_bit_for_bit():
    """In fp32 and bf16, whole sequences and cached decoding alike."""
    for dtype in (torch.float32, torch.bfloat16):
        base, model = tiny(dtype=dtype), tiny(dtype=dtype)
        tinylora.adapt(model, 13)
        ids = torch.arange(24).view(2, 12)
        assert torch.equal(base(ids), model(ids))
        for a, b in zip(rollout(base), rollout(model)):
            assert a == b if isinstance(a, list) else torch.equal(a, b)


def test_the_layer_is_the_formula():
    """y = W x + U S R V^T x with R = sum v_i P_i / sqrt(u): S once, R not transposed, 1/sqrt(u) there, bias kept."""
    model = tiny()
    v = random_v(tinylora.adapt(model, u=3, n_tie=5, rank=2, seed=7))
    for index, layer in enumerate([m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]):
        W = layer.base.weight
        U, S, V, _ = tinylora.truncated_svd(W, 2)
        P = torch.from_numpy(np.random.RandomState([1, 7, index, 0]).standard_normal((3, 2, 2))).float()
        R = sum(v[index // 5, i] * P[i] for i in range(3)) / math.sqrt(3)
        x = torch.randn(4, W.shape[1])
        want = x @ (W + U @ torch.diag(S) @ R @ V.T).T + (0 if layer.base.bias is None else layer.base.bias)
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_R_is_not_rounded_on_a_bf16_model():
    """Bug 14's cousin: a step of v that bf16 cannot see (1e-4 of 1) still moves the layer's output, in training and in sampling."""
    model = tiny(dtype=torch.bfloat16)
    v = tinylora.adapt(model, 1)
    layer = model.layers[0].mlp.up_proj
    layer.base.weight.zero_()  # only U S R V^T x is left to see
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((500, 32))).bfloat16()
    outputs, sampled, cores = [], [], []
    for value in (1.0, 1.0001):
        v.fill_(value)
        outputs.append(layer(x))
        with tinylora.held(model):
            sampled.append(layer(x))
        cores.append(layer.core().bfloat16())
    assert torch.equal(*cores)
    for first, second in (outputs, sampled):
        assert 0.001 < (first != second).float().mean() < 0.5


@torch.no_grad()
def test_sampling_holds_the_same_layer():
    """`held` computes R (U S)^T once: the plain forward's function, in bf16 as near to the formula; v's next value is seen by the next block."""
    for dtype, tol in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        model = tiny(dtype=dtype)
        v = tinylora.adapt(model, u=3, n_tie=5, seed=7)
        for seed in (0, 1):
            random_v(v, seed=seed)
            with tinylora.held(model):
                for module in [m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]:
                    module.base.weight.zero_()  # only U S R V^T x is left to see
                    module.base.bias = None
                    x = torch.from_numpy(np.random.RandomState(0).standard_normal((500, module.Vt.shape[1]))).to(dtype)
                    exact = x.double() @ module.Vt.T.double() @ module.core().T.double() @ module.US.T.double()
                    assert module.held is not None
                    held, kept, module.held = module(x), module.held, None
                    plain, module.held = module(x), kept
                    assert all((y - exact).norm() < tol * exact.norm() for y in (held, plain))
            assert all(m.held is None for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear))


GOLDEN_P = [-0.43666387, 0.22524047, 0.48923835, 0.26245433]


def test_P_is_numpys_frozen_stream():
    """P differs between modules and is the same on every machine: the first numbers are written down here."""
    model = tiny()
    tinylora.adapt(model, 13, seed=0)
    P = torch.stack([m.P for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)])
    assert len({tuple(p.flatten().tolist()) for p in P}) == 14
    assert P[0].flatten().tolist() == pytest.approx(GOLDEN_P, rel=1e-6)


def test_adapter_file_is_26_bytes_and_travels(tmp_path):
    """One tensor of 13 numbers; another process rebuilds bit-equal logits from it."""
    model = transformer.load(TOY)
    v = random_v(tinylora.adapt(model, 13, seed=3), 0.1)
    with torch.no_grad():
        v.copy_(v.bfloat16())
    for dtype, size in (("bf16", 26), ("fp32", 52)):
        tinylora.save(tmp_path / f"{dtype}.safetensors", v, model, dtype)
        with safe_open(tmp_path / f"{dtype}.safetensors", "pt") as file:
            assert list(file.keys()) == ["v"]
            stored = file.get_tensor("v")
        assert stored.shape == (13,) and stored.nbytes == size
        raw = (tmp_path / f"{dtype}.safetensors").read_bytes()
        assert len(raw) - 8 - int.from_bytes(raw[:8], "little") == size
        code = (f"import torch, model, tinylora; m = model.load({str(TOY)!r}); tinylora.load({str(tmp_path / dtype)!r} + '.safetensors', m);"
                f"from safetensors.torch import save_file; save_file({{'y': m(torch.arange(40).view(2, 20))}}, {str(tmp_path / 'y')!r})")
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "5"})
        assert torch.equal(load_file(tmp_path / "y")["y"], model(torch.arange(40).view(2, 20)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_travels_between_thread_counts(dtype, tmp_path):
    """Another thread count sums in another order: the same policy to rounding (1e-4 in fp32; in bf16 no further than bf16 itself is from fp32)."""
    model, logits = transformer.load(TOY), {}
    v = random_v(tinylora.adapt(model, 13, seed=3), 0.5)
    tinylora.save(tmp_path / "a.safetensors", v, model)
    want = model(torch.arange(40).view(2, 20))
    for threads in ("1", "2"):
        code = (f"import torch, model, tinylora; m = model.load({str(TOY)!r}, torch.{dtype}); tinylora.load({str(tmp_path / 'a.safetensors')!r}, m); assert torch.get_num_threads() == {threads};"
                f"from safetensors.torch import save_file; save_file({{'y': m(torch.arange(40).view(2, 20)).float()}}, {str(tmp_path / 'y')!r})")
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads})
        logits[threads] = load_file(tmp_path / "y")["y"]
    bound = 1e-4 if dtype == "float32" else (logits["1"] - want).abs().max().item()
    torch.testing.assert_close(logits["1"], logits["2"], atol=bound, rtol=0)


OTHER_PYTHON = os.environ.get("TINYLORA_OTHER_PYTHON")
REBUILD = """
import sys, torch, model, tinylora, test_tinylora
from safetensors.torch import save_file
phase, folder, me, other = sys.argv[1:]
def modules(m): return [x for x in m.modules() if isinstance(x, tinylora.TinyLoRALinear)]
for base in ("float32", "bfloat16"):
    for kept in ("fp32", "bf16"):
        for maker in (me,) if phase == "save" else (me, other):
            m, path = model.load(test_tinylora.TOY, getattr(torch, base)), f"{folder}/{maker}-{base}-{kept}.safetensors"
            if phase == "save":
                tinylora.save(path, test_tinylora.random_v(tinylora.adapt(m, 13, seed=3), 0.5), m, kept)
                continue
            v = tinylora.load(path, m)
            y = m(torch.arange(40).view(2, 20)).float().detach()
            save_file({"v": v.detach().clone(), "P": torch.stack([x.P for x in modules(m)]), "US": torch.cat([x.US.flatten() for x in modules(m)]), "logits": y,
                       "logp": y.log_softmax(-1)}, f"{path}.{me}", {"base": tinylora.read(path)[1]["base"], "torch": torch.__version__})
"""


@pytest.mark.skipif(not OTHER_PYTHON, reason="needs TINYLORA_OTHER_PYTHON, the python of an environment with another torch version")
def test_adapter_travels_between_torch_versions(tmp_path):
    """Saved under one torch, rebuilt under another, both ways, fp32 and bf16 base and v: the same fingerprint, v and P to the bit; logits and log-probs to
    the bounds that other thread counts have (1e-4 in fp32; in bf16 no further than bf16 itself is from fp32)."""
    for phase in ("save", "load"):
        for python, me, other in ((sys.executable, "here", "there"), (OTHER_PYTHON, "there", "here")):
            subprocess.run([python, "-c", REBUILD, phase, str(tmp_path), me, other], check=True, cwd=ROOT)

    def rebuilt(maker, base, kept, by):
        path = tmp_path / f"{maker}-{base}-{kept}.safetensors.{by}"
        with safe_open(path, "pt") as file:
            return load_file(path), file.metadata()
    seen = set()
    for maker in ("here", "there"):
        for kept in ("fp32", "bf16"):
            exact = rebuilt(maker, "float32", kept, "here")[0]
            for base in ("float32", "bfloat16"):
                (a, facts), (b, others) = (rebuilt(maker, base, kept, by) for by in ("here", "there"))
                assert facts["torch"] != others["torch"]  # or nothing was tested
                seen |= {facts["base"], others["base"]}
                assert torch.equal(a["P"], b["P"]) and torch.equal(a["v"], b["v"]) and torch.equal(a["v"], rebuilt("here", base, kept, "here")[0]["v"]) and a["v"].any()
                torch.testing.assert_close(a["US"], b["US"], atol=1e-4 if base == "float32" else 0.01 * a["US"].abs().max().item(), rtol=0)
                for name in ("logits", "logp"):
                    bound = 1e-4 if base == "float32" else (a[name] - exact[name]).abs().max().item()
                    torch.testing.assert_close(a[name], b[name], atol=bound, rtol=0)
    assert len(seen) == 1


def test_adapter_on_another_base_or_with_other_settings(tmp_path):
    """The error says what differs; a base loaded in bf16 is still the same base; a damaged file is told."""
    model, path = tiny(), tmp_path / "a.safetensors"
    v = random_v(tinylora.adapt(model, 13))
    tinylora.save(path, v, model)
    for kw, word in ((dict(rank=3), "rank is 2 in the file and 3 here"), (dict(seed=1), "seed"), (dict(params=14), "groups"), (dict(tie="structured", params=7), "tie")):
        other = tiny()
        tinylora.adapt(other, **{"params": 13} | kw)
        with pytest.raises(InputError, match=word):
            tinylora.load(path, other)
    for other in (tiny(seed=1), tiny(theta=1e6)):
        with pytest.raises(InputError, match="base is"):
            tinylora.load(path, other)
    half = tiny(dtype=torch.bfloat16)
    assert torch.equal(tinylora.load(path, half), v)
    again = tiny()
    tinylora.adapt(again, 13)
    assert torch.equal(tinylora.load(path, again), v)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match="cannot be read"):
        tinylora.load(path, tiny())
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not a TinyLoRA adapter"):
        tinylora.load(path, tiny())


def test_lora_xs_is_tinylora_with_R_free():
    """One R per module, r^2 numbers each, v is R itself: y = W x + U S R V^T x."""
    model = tiny()
    v = random_v(tinylora.adapt(model, rank=3, method="lora-xs"))
    assert v.shape == (14, 9)
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)):
        U, S, V, _ = tinylora.truncated_svd(layer.base.weight, 3)
        x = torch.randn(4, len(V))
        torch.testing.assert_close(layer(x), layer.base(x) + x @ (U @ torch.diag(S) @ v[i].view(3, 3) @ V.T).T, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- lora.py, export.py

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_starts_at_the_base_and_learns_in_fp32(dtype):
    """Bit for bit the base at first, alpha / r as its scale, A from numpy's stream within 1/sqrt(d_in), fp32 on a bf16 model too (bug 14)."""
    base, model = tiny(dtype=dtype), tiny(dtype=dtype)
    params = lora.adapt(model, rank=2, alpha=6.0, seed=3)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(base(ids), model(ids)) and {p.dtype for p in params} == {torch.float32} and len(params) == 28
    assert [p for p in model.parameters() if p.requires_grad] == params or {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in params}
    A, B = params[:2]
    assert 0.8 < A.abs().max() * math.sqrt(32) <= 1 and not torch.equal(A[:, :8], params[2][:, :8])
    with torch.no_grad():
        B.normal_()
    x = torch.randn(5, 32).to(dtype)
    q = model.layers[0].self_attn.q_proj
    want = base.layers[0].self_attn.q_proj(x).float() + 3.0 * x.float() @ (B @ A).T
    torch.testing.assert_close(q(x).float(), want, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-5 if dtype == torch.float32 else 0.02)


LORA_DAMAGE = {  # how a LoRA folder is broken, and the words of the message
    "another kind": (dict(peft_type="IA3"), ["peft_type"]), "dora": (dict(use_dora=True), ["use_dora"]), "no rank": (dict(r=None), ["r is None"]),
    "rank 3": (dict(r=3), ["shape"]), "rank too large": (dict(r=99), ["--rank 99"]), "modules_to_save": (dict(modules_to_save=["lm_head"]), ["modules_to_save"]),
}


@pytest.mark.parametrize("name", [*LORA_DAMAGE, "truncated", "no weights", "no config", "tensor missing"])
def test_damaged_lora_folders_are_told_in_one_line(name, tmp_path, capsys):
    model = transformer.load(TOY)
    lora.adapt(model, rank=2)
    folder = tmp_path / "lora"
    lora.save(folder, model)
    config, weights, words = folder / "adapter_config.json", folder / "adapter_model.safetensors", [str(folder)]
    if name in LORA_DAMAGE:
        config.write_text(json.dumps(json.loads(config.read_text()) | LORA_DAMAGE[name][0]))
        words = LORA_DAMAGE[name][1]
    elif name == "truncated":
        os.truncate(weights, 1000)
    elif name == "tensor missing":
        state = load_file(weights)
        state.pop(sorted(state)[0])
        save_file(state, weights)
    else:
        (weights if name == "no weights" else config).unlink()
    assert train.main(["--eval-only", "--eval-count", "1", "--adapter", str(folder), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("error: ") and all(word in message for word in words), message


def test_show_says_what_an_adapter_is(tmp_path, capsys):
    """python tinylora.py show: numbers, bytes, how it is rebuilt, the base and v, of our files; a line of PEFT's folders; no model is read."""
    model = tiny()
    v = random_v(tinylora.adapt(model, 13, seed=5))
    tinylora.save(tmp_path / "a.safetensors", v, model, "bf16", "owner/base")
    assert export.main(["show", str(tmp_path / "a.safetensors")]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("13 trained numbers in bf16: 26 bytes", "13 tiled groups x u 1", "rank 2", "seed 5", "'owner/base'", model.adapter["base"][:12])), out
    assert out.split(": ")[-1].split() == [f"{x:+.4g}" for x in v.bfloat16().flatten().tolist()]
    model = tiny()
    lora.adapt(model, rank=3)
    lora.save(tmp_path / "lora", model, base="owner/base")
    assert export.main(["show", str(tmp_path / "lora")]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("rank 3", "alpha 32", "'owner/base'")), out
    assert export.main(["show", str(TOY / "model.safetensors")]) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--to", "peft"], ["--to", "gguf", "--out", "x"], ["--to", "peft", "--out", str(TOY)], ["--to", "merged", "--out", "/proc/x"], ["--model", "nowhere", "--to", "peft", "--out", "new"]], ids=" ".join)
def test_export_mistakes_end_in_one_line(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = transformer.load(TOY)
    tinylora.save("a.safetensors", tinylora.adapt(model, 13), model, base=str(TOY))
    assert export.main(["export", "a.safetensors", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    tinylora.save("b.safetensors", model.layers[0].mlp.up_proj.v, model)
    assert export.main(["export", "b.safetensors", "--to", "peft", "--out", "new"]) == 2 and "--model" in capsys.readouterr().err
    assert export.main(["export", "nowhere", "--to", "peft", "--out", "new"]) == 2 and "nowhere" in capsys.readouterr().err
    done = subprocess.run([sys.executable, str(ROOT / "tinylora.py"), "export", "a.safetensors", "--to", "peft", "--out", "good"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("good: a LoRA of rank 2"), done  # as a command, and found by the file's own hint


# ----------------------------------------------------------------------------------------------------- grpo.py

def test_sampler_and_trainer_are_one_policy():
    """Bugs 2, 6, 19: the trainer's log-probs of a ragged batch are the sampler's, at any temperature, adapter on."""
    model = tiny()
    random_v(tinylora.adapt(model, 13))
    for temperature in (1.0, 0.5, 2.0):
        prompts, ids, mask, logp = rollout(model, temperature=temperature, vocab=45)
        assert 0 < (~mask).sum() and logp[mask].std() > 0
        got = grpo.logprobs(model, prompts, ids, mask, temperature, vocab=45)
        torch.testing.assert_close(got, logp, atol=2e-5, rtol=1e-5)
        assert torch.equal(got, grpo.logprobs(model, prompts, ids, mask, temperature, vocab=45, recompute=True))
    assert not torch.allclose(got, grpo.logprobs(model, prompts, ids, mask, 1.0, vocab=45), atol=1e-2)


def test_a_row_does_not_depend_on_its_batch():
    """Same noise, same text: alone, in a group, with finished rows dropped early or never (bugs 5, 19)."""
    model = tiny()
    prompts, ids, mask, logp = rollout(model, length=24)
    noise = np.random.RandomState(0).random_sample((12, 24))
    for other in (dict(check_every=1), dict(check_every=3), dict(check_every=100)):
        _, ids2, mask2, logp2 = rollout(model, length=24, **other)
        n = min(ids.shape[1], ids2.shape[1])
        assert torch.equal(ids[:, :n], ids2[:, :n]) and mask[:, n:].sum() == mask2[:, n:].sum() == 0
        torch.testing.assert_close(logp[:, :n], logp2[:, :n], atol=1e-5, rtol=1e-5)
    for i in range(12):
        ids1, mask1, logp1 = grpo.generate(model, [prompts[i]], 1, 24, (0, 3), 1.0, noise[i:i + 1])
        k = int(mask1.sum())
        assert k == int(mask[i].sum()) and torch.equal(ids1[0, :k], ids[i, :k])
        torch.testing.assert_close(logp1[0, :k], logp[i, :k], atol=1e-5, rtol=1e-5)
    assert len({int(t) for t in ids[:4, 0]}) > 1, "the group shares its first token (bug 5)"


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the same operations on the same memory, with every Python number as it was when they were recorded."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        assert not {"_local_scalar_dense", "nonzero", "_unique2", "bincount"} & {op.__name__.split(".")[0]}, f"{op} waits for the device"
        self.ops.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.ops:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # views and in-place results are where they were
                    old.copy_(new.view_as(old))  # squeeze_ may have changed its shape since


@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_a_captured_step_gives_the_plain_text(kw, monkeypatch):
    """Same noise: same tokens and log-probs (1e-5) from replayed steps, over several sizes of rows and columns, when rows leave, in later rollouts
    with other prompts and another v, and when the shape changes; nothing captured depends on a Python number or waits for the device."""
    captured = []

    def capture(self, size):
        state = [self.token, self.out, self.cache.k, self.cache.v, self.cache.position, self.cache.lengths, self.cache.column]
        before = [x.clone() for x in state]
        self.cache.column.zero_()  # the last column may be written already
        with Tape() as tape:
            self.step(*size)
        for x, old in zip(state, before):  # a real capture records and does not run
            x.copy_(old)
        captured.append(size)
        return tape

    monkeypatch.setattr(graph, "COLUMNS", 8)
    monkeypatch.setattr(graph.Graphs, "capture", capture)
    model = tiny(**kw)
    v = tinylora.adapt(model, 13)
    graphs, sizes = graph.Graphs(model), []
    for seed, (P, group, length, greedy) in enumerate([(5, 4, 30, False), (5, 4, 30, False), (5, 4, 30, True), (3, 2, 12, False), (5, 4, 30, False), (10, 2, 30, False)]):
        random_v(v, 0.1 * seed)
        rng = np.random.RandomState(seed)
        prompts = [list(rng.randint(0, 50, 1 + 3 * i % 7)) for i in range(P)]
        noise = None if greedy else rng.random_sample((P * group, length))
        results = []
        for model.graphs in (None, graphs):
            results.append(grpo.generate(model, prompts, group, length, (0, 3), 1.0, noise))
        (ids, mask, logp), (ids2, mask2, logp2) = results
        assert torch.equal(ids, ids2) and torch.equal(mask, mask2)
        torch.testing.assert_close(logp, logp2, atol=1e-5, rtol=1e-5)
        sizes.append(len(captured))
    assert len({B for B, _ in captured}) > 2 and len({width for _, width in captured}) > 2
    assert sizes[0] > 3 and sizes[1] - sizes[0] < sizes[0] and sizes[3] > sizes[2]  # kept for the next rollout, made anew for another shape


def test_many_adapters_in_one_batch_equal_single_runs():
    """64 different v's in one batch, ragged prompts, rows dropped as they end: each row's text and log-probs are those of its own run, to 1e-5; v itself is untouched."""
    model = tiny()
    v = random_v(tinylora.adapt(model, 26, rank=3), 0.1)
    values = torch.from_numpy(np.random.RandomState(3).standard_normal((64, *v.shape))).float() * 0.5
    prompts = [list(np.random.RandomState(i).randint(0, 50, 3 + i % 7)) for i in range(64)]
    noise, which = np.random.RandomState(0).random_sample((128, 20)), np.random.RandomState(1).permutation(64)
    with tinylora.many(model, values):
        ids, mask, logp = grpo.generate(model, prompts, 2, 20, (0, 3), 1.0, noise, which=which)
    assert 0 < (~mask).sum() and model.bank.which is None
    before = v.detach().clone()
    for i in range(64):
        with torch.no_grad():
            v.copy_(values[which[i]])
        one_ids, one_mask, one_logp = grpo.generate(model, [prompts[i]], 2, 20, (0, 3), 1.0, noise[2 * i:2 * i + 2])
        n = one_ids.shape[1]
        assert torch.equal(one_ids, ids[2 * i:2 * i + 2, :n]) and torch.equal(one_mask, mask[2 * i:2 * i + 2, :n])
        torch.testing.assert_close(one_logp, logp[2 * i:2 * i + 2, :n], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        v.copy_(before)


def test_greedy_is_argmax():
    """noise=None takes the most likely token; its log-probs are at temperature 1 whatever is asked."""
    model = tiny()
    ids, mask, logp = grpo.generate(model, [[5, 6, 7]], 1, 6, (49,), temperature=0.3)
    text = [5, 6, 7]
    for t in range(int(mask.sum())):
        best = model(torch.tensor([text]))[0, -1].log_softmax(-1)
        text.append(int(best.argmax()))
        assert logp[0, t].item() == pytest.approx(best.max().item(), abs=1e-5)
    assert text[3:] == ids[0, :int(mask.sum())].tolist()


def test_numbers_that_blow_up_are_an_error():
    """NaN logits must not pass as text: neither in sampling nor in an update."""
    model = tiny()
    v = tinylora.adapt(model, 5)
    prompts, ids, mask, logp = rollout(model)
    with torch.no_grad():
        v.fill_(1e30)
    with pytest.raises(InputError, match="not finite"):
        rollout(model)
    with pytest.raises(InputError, match="not finite"):
        grpo.update(model, [v], torch.optim.AdamW([v]), prompts, ids, mask, logp, torch.ones(12), lr=[0.1])


def test_the_mask_ends_with_one_stop_token():
    """Bugs 1, 3: every stop id ends a row, the stop token itself is in the mask, nothing after it is."""
    model = tiny(vocab=8)
    _, ids, mask, logp = rollout(model, prompts=[[1, 2, 4]], group=64, length=20, stops=(0, 3))
    ended = {}
    for row, m in zip(ids, mask):
        n = int(m.sum())
        assert m[:n].all() and not m[n:].any() and not any(int(t) in (0, 3) for t in row[:n - 1])
        if n < ids.shape[1]:
            ended[int(row[n - 1])] = True
    assert set(ended) == {0, 3} and (logp[~mask] == 0).all() and (logp[mask] < 0).all()


def test_progress_is_told_at_every_look():
    """Rows counted that are still going on, or only those left in the batch once some were dropped; more looks than one every 4 tokens."""
    told = []
    _, ids, mask, _ = rollout(tiny(), length=40, group=30, progress=lambda *x: told.append(x))
    lengths, ended = mask.sum(1), torch.isin(ids, torch.tensor([0, 3])).logical_and(mask).any(1)
    assert told == [(t, int((ended & (lengths <= t)).sum())) for t in range(4, 40, 4)][:len(told)] and len({done for _, done in told}) > 4
    assert len(told) == 9 or told[-1][1] == 90


def test_ids_beyond_the_tokenizer_are_never_drawn():
    """Bug 20: the head is cut in sampler and trainer alike, so probabilities sum to 1 over real ids."""
    model = tiny()
    prompts, ids, mask, _ = rollout(model, group=64, vocab=10, stops=(0,))
    assert ids.max() == 9
    h = model.hidden(torch.tensor([[1, 2, 3]]))
    assert model.logits(h, 10).shape[-1] == 10 and torch.equal(model.logits(h, 10), model.logits(h)[..., :10])
    one = torch.ones(10, 1, dtype=torch.bool)
    total = grpo.logprobs(model, [[1, 2, 3]] * 10, torch.arange(10)[:, None], one, 0.7, vocab=10).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_draw_samples_the_full_softmax():
    """Bugs 7, 22: frequencies are the probabilities, tails included; zero-probability tokens never appear, even at the ends."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.1999, 0.0001, 0.0])
    edges = torch.cat((torch.linspace(0, 1, 200001, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53], dtype=torch.float64)))
    tokens = grpo.draw(p.log().expand(len(edges), -1), edges)
    share = torch.bincount(tokens, minlength=7) / len(edges)
    torch.testing.assert_close(share, p, atol=2e-5, rtol=0)
    assert share[0] == share[2] == share[6] == 0


def test_a_large_vocabulary_in_parts_is_the_whole():
    """Sampling takes some rows at a time, the head some ids at a time (on a CPU): the plain product, softmax and draw say the same."""
    rng = np.random.RandomState(0)
    V = 2**14 + 5  # 15 rows of 40 at a time; the head in 9 parts, the last of 5 ids
    x, W = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((40, 24), (V, 24)))
    uniform = torch.from_numpy(rng.random_sample(40))
    logits = transformer.linear(x, W)
    torch.testing.assert_close(logits, x @ W.T, atol=1e-12, rtol=0)
    assert logits.is_contiguous()
    bias = torch.from_numpy(rng.standard_normal(V))
    torch.testing.assert_close(transformer.linear(x, W, bias), x @ W.T + bias, atol=1e-12, rtol=0)
    for noise, temperature in ((uniform, 0.7), (None, 1.0)):
        token, logp = grpo.sample(logits, temperature, noise)
        want = (logits / temperature).log_softmax(-1)
        assert torch.equal(token, grpo.draw(want, noise))
        torch.testing.assert_close(logp, want.gather(1, token[:, None])[:, 0].float(), atol=1e-6, rtol=0)


def test_log_softmax_is_fp32():
    """Bug 13: bf16 logits are normalised in fp32."""
    x = torch.randn(4, 1000).bfloat16()
    got = grpo.log_softmax(x, 0.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), (x.double() / 0.5).log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_advantages():
    """Bug 11: standardised in the group; equal rewards give exactly 0, a group of 1 gives 0 and no NaN."""
    got = grpo.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]]))
    assert got[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-4) and (got[1:] == 0).all()
    for group in range(2, 33):  # sums of 0.1 round: the mean of equal rewards is not always the reward
        assert (grpo.advantages(torch.full((1, group), 0.1)) == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a standard deviation over one number
        assert (grpo.advantages(torch.tensor([[0.3], [1.0]])) == 0).all()


def test_loss_by_hand():
    """Clip sides (low on negative, high on positive advantages), token level, one denominator, empty masks (bug 10), k3 KL."""
    old = torch.zeros(2, 3)
    logp = torch.tensor([[math.log(2.0), math.log(1.3), math.log(0.5)], [math.log(0.5), math.log(0.9), math.log(2.0)]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    got = grpo.grpo_loss(logp, old, torch.tensor([1.0, -2.0]), mask, 5, 0.2, 0.4)
    want = -((1.4 + 1.3 + 0.5) + (-2 * 0.8 + -2 * 0.9)) / 5  # 0.5 with A > 0 and 2.0 with A < 0 are not clipped
    assert got.item() == pytest.approx(want, rel=1e-6)
    kl = grpo.grpo_loss(logp, logp, torch.tensor([0.0, 0.0]), mask, 5, kl=0.1, base_logp=old)
    terms = [math.exp(-x) + x - 1 for x in logp[mask].tolist()]
    assert kl.item() == pytest.approx(0.1 * sum(terms) / 5, rel=1e-5)
    nothing = grpo.grpo_loss(logp, old, torch.tensor([1.0, 1.0]), mask & False, 0)
    assert nothing.item() == 0
    bad = logp.masked_fill(~mask, float("inf"))  # garbage behind the mask stays there
    assert torch.isfinite(grpo.grpo_loss(bad, old, torch.tensor([1.0, -2.0]), mask, 5))


def gradient(v, model, data, micro_tokens=10**9, **kw):
    """v.grad as update leaves it (learning rate 0, no gradient clipping)."""
    prompts, ids, mask, logp, advantage = data
    optimizer = torch.optim.AdamW([v], lr=0.0, weight_decay=0.0)
    before = [x.clone() for x in (ids, mask, logp, advantage)]
    metrics = grpo.update(model, [v], optimizer, prompts, ids, mask, logp, advantage, lr=[0.0], grad_clip=1e30, micro_tokens=micro_tokens,
                          v_dtype=v.dtype, reference=[torch.zeros_like(v)], **kw)
    assert all(torch.equal(a, b) for a, b in zip(before, (ids, mask, logp, advantage))), "changed in place (bug 9)"
    return v.grad.clone(), metrics


@functools.lru_cache
def off_policy_batch(dtype):
    """A batch sampled from another v, so that ratios are not 1 and some tokens are clipped."""
    model = tiny(dtype=dtype)
    v = tinylora.adapt(model, 5)
    v.data = v.data.to(dtype)
    for m in model.modules():
        if isinstance(m, tinylora.TinyLoRALinear):
            m.P = m.P.to(dtype)
    prompts, ids, mask, logp = rollout(model, temperature=0.8, group=4)
    advantage = grpo.advantages(torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])).flatten().to(dtype)
    random_v(v, 0.05)
    return model, v, (prompts, ids, mask, logp.to(dtype), advantage)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gradient_equals_finite_differences(kl):
    """Bug 16 and most others: in fp64, d loss / d v is the slope of the loss computed from scratch with plain code."""
    model, v, data = off_policy_batch(torch.float64)
    prompts, ids, mask, old, advantage = data
    got, metrics = gradient(v, model, data, kl=kl, temperature=0.8)
    assert got.abs().min() > 1e-6 and metrics["clip_fraction"] > 0

    def loss(values):  # row by row, no batching, no chunks: the definition
        kept, total = v.detach().clone(), 0.0
        for i, prompt in enumerate(prompts):
            n = int(mask[i].sum())
            text = torch.tensor([prompt + ids[i, :n].tolist()])
            both = []
            for at in (values, torch.zeros_like(values)):
                v.data = at
                both.append((model(text)[0, len(prompt) - 1:-1] / 0.8).log_softmax(-1).gather(1, ids[i, :n, None])[:, 0])
            logp, base = both
            ratio = (logp - old[i, :n]).exp()
            total = total - torch.minimum(ratio * advantage[i], ratio.clamp(0.8, 1.4) * advantage[i]).sum()
            total = total + kl * ((base - logp).exp() - (base - logp) - 1).sum()
        v.data = kept
        return (total / mask.sum()).item()

    with torch.no_grad():
        for i in range(v.numel()):
            h = torch.zeros_like(v)
            h.view(-1)[i] = 1e-5
            slope = (loss(v + h) - loss(v - h)) / 2e-5
            assert got.view(-1)[i].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_does_not_depend_on_the_micro_batch(dtype):
    """Bug 8: one row at a time, a few, or all at once; with and without recomputation. In fp64 to 1e-12; in fp32 what
    remains is the rounding of kernels that sum in another order for another batch shape, 1.2e-6 here."""
    model, v, data = off_policy_batch(dtype)
    whole, metrics = gradient(v, model, data)
    assert whole.abs().max() > 1e-3
    for micro_tokens, kw in ((1, {}), (40, {}), (100, {"recompute": True})):
        got, other = gradient(v, model, data, micro_tokens, **kw)
        assert (got - whole).norm() <= (5e-6 if dtype == torch.float32 else 1e-12) * whole.norm()
        assert other["gap"] == pytest.approx(metrics["gap"], rel=1e-4) and other["clip_fraction"] == metrics["clip_fraction"]


def test_groups_without_signal_cost_no_forward_and_change_nothing(monkeypatch):
    """Bug 11: skipped rows never reach the model, yet count in the denominator; all skipped gives a zero gradient."""
    model, v, (prompts, ids, mask, old, advantage) = off_policy_batch(torch.float64)
    seen, real = [], grpo.logprobs
    monkeypatch.setattr(grpo, "logprobs", lambda m, p, *a, **k: seen.extend(p) or real(m, p, *a, **k))
    got, _ = gradient(v, model, (prompts, ids, mask, old, advantage))
    assert len(seen) == 8
    v.grad = None
    loss = grpo.grpo_loss(real(model, prompts, ids, mask), old, advantage, mask, int(mask.sum()))
    loss.backward()
    torch.testing.assert_close(got, v.grad, rtol=1e-10, atol=0)
    seen.clear()
    none, metrics = gradient(v, model, (prompts, ids, mask, old, torch.zeros_like(advantage)))
    assert not seen and (none == 0).all() and metrics["gap"] is None and metrics["clip_fraction"] == 0


def test_metrics_ignore_padding():
    """Bug 12: the same numbers with twenty more columns of padding."""
    model, v, (prompts, ids, mask, old, advantage) = off_policy_batch(torch.float64)
    wide = [torch.nn.functional.pad(x, (0, 20)) for x in (ids, mask, old)]
    _, a = gradient(v, model, (prompts, ids, mask, old, advantage))
    _, b = gradient(v, model, (prompts, *wide, advantage))
    assert a == pytest.approx(b, rel=1e-9)
    assert a["entropy"] == pytest.approx(-old[mask].mean().item())
    assert a["gap"] > 1e-3  # these rollouts are another v's: the metric must say so


def test_minibatches_are_separate_updates():
    """Two mini-batches = two Adam steps, each with its own denominator and learning rate."""
    model, v, (prompts, ids, mask, old, advantage) = off_policy_batch(torch.float64)
    keep, start = [0, 1, 2, 3, 8, 9, 10, 11], v.detach().clone()
    part = lambda rows: ([prompts[i] for i in rows], ids[rows], mask[rows], old[rows], advantage[rows])
    optimizer = torch.optim.AdamW([v], weight_decay=0.0)
    grpo.update(model, [v], optimizer, *part(keep), lr=[0.01, 0.02], minibatches=2, v_dtype=v.dtype)
    both = v.detach().clone()
    v.data = start.clone()
    optimizer = torch.optim.AdamW([v], weight_decay=0.0)
    for rows, lr in ((keep[:4], 0.01), (keep[4:], 0.02)):
        grpo.update(model, [v], optimizer, *part(rows), lr=[lr], v_dtype=v.dtype)
    assert torch.equal(both, v) and not torch.equal(v, start)
    v.data = start


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_v_dtype_rounds_the_stored_value_only(dtype):
    """Bug 14: on a bf16 model too, v, P and Adam's state are fp32; with --v-dtype the value after a step is that type's."""
    model = tiny(dtype=torch.bfloat16)
    v = tinylora.adapt(model, 5)
    prompts, ids, mask, logp = rollout(model)
    optimizer = torch.optim.AdamW([v], weight_decay=0.0)
    advantage = grpo.advantages(torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 1, 0]])).flatten()
    for _ in range(3):
        grpo.update(model, [v], optimizer, prompts, ids, mask, logp, advantage, lr=[0.0123], v_dtype=tinylora.DTYPES[dtype])
    assert v.dtype == torch.float32 and torch.equal(v, v.to(tinylora.DTYPES[dtype]).float()) and v.abs().min() > 0
    assert dtype == "fp32" or not torch.equal(v * 1.001, (v * 1.001).to(tinylora.DTYPES[dtype]).float())
    assert all(s.dtype == torch.float32 for s in optimizer.state[v].values())
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def test_training_leaves_the_base_alone():
    """Bug 15: nothing is merged, so setting v back to 0 gives the base model bit for bit."""
    base, model = tiny(), tiny()
    v = tinylora.adapt(model, 13)
    prompts, ids, mask, logp = rollout(model)
    advantage = grpo.advantages(torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 1, 0]])).flatten()
    grpo.update(model, [v], torch.optim.AdamW([v]), prompts, ids, mask, logp, advantage, lr=[0.5])
    ids = torch.arange(20)[None]
    assert not torch.allclose(base(ids), model(ids), atol=1e-3)
    with torch.no_grad():
        v.zero_()
    assert torch.equal(base(ids), model(ids))


def test_micro_batches_cover_every_row_once():
    """Within the budget, prompts counted once, groups together; a row that is too long alone goes alone."""
    lengths, prompts = [5, 9, 2, 7, 7, 1, 30], [[1, 2, 3], [1, 2, 3], [4], [4], [1, 2, 3], [5, 6], [5, 6]]
    for tokens in (1, 10, 18, 1000):
        batches = list(grpo.micro_batches(prompts, lengths, range(7), tokens))
        assert sorted(i for b in batches for i in b) == list(range(7))
        for b in batches:
            assert len(b) == 1 or sum(map(len, {tuple(prompts[i]) for i in b})) + sum(lengths[i] for i in b) <= tokens
    assert [sorted(b) for b in grpo.micro_batches(prompts, lengths, range(7), 34)] == [[5, 6], [0, 1, 2, 3, 4]]


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(monkeypatch):
    """The update goes on with what fits and says what that is; the gradient is the same, and a single row that does not fit is an error."""
    model, v, data = off_policy_batch(torch.float64)
    want, _ = gradient(v, model, data)
    real, limit = grpo.logprobs, 3

    def short(model, prompts, *rest, **kw):
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, prompts, *rest, **kw)
    monkeypatch.setattr(grpo, "logprobs", short)
    got, metrics = gradient(v, model, data, 2000)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    assert metrics["micro_tokens"] < 100
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        gradient(v, model, data, 2000)


def test_training_keeps_no_more_than_it_must():
    """No linear's input is kept, as only a weight's gradient would need it, and the mask is kept once, not once a layer."""
    model = tiny(layers=3)
    tinylora.adapt(model, 13)
    prompts, ids, mask, _ = rollout(model)
    inputs, kept = [], []
    for module in model.modules():
        if isinstance(module, tinylora.TinyLoRALinear):
            module.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        grpo.logprobs(model, prompts, ids, mask)
    kept_at, R = {x.untyped_storage().data_ptr() for x in kept}, 2 * (ids.shape[1] - 1)
    assert len(inputs) == 2 * 3 * 7 and not kept_at & {x.untyped_storage().data_ptr() for x in inputs}
    assert len({x.untyped_storage().data_ptr() for x in kept if x.dim() == 4 and x.shape[:3] == (1, len(ids), R)}) == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_given_up_leaves_nothing(recompute):
    """When memory runs out the next try needs what the failed one held: checkpoints and the keys they computed held each other for good."""
    model = tiny(layers=3)
    tinylora.adapt(model, 13)
    prompts, ids, mask, _ = rollout(model)
    outputs = []

    def note(block, given, x):
        outputs.append(weakref.ref(x))
        if len(outputs) == fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
    model.layers[1].register_forward_hook(note)
    for fails in (None, 1, 2):
        outputs.clear()
        try:
            grpo.logprobs(model, prompts, ids, mask, recompute=recompute)
        except torch.OutOfMemoryError:
            pass
        assert len(outputs) == (fails or 2) and all(ref() is None for ref in outputs), fails


# ---------------------------------------------------------------------------------------------------- gsm8k.py

Q = "Q?" + gsm8k.INSTRUCTION


ANSWERS = [  # text, strict, lenient (bug 23)
    ("#### 18", "18", "18"), ("#### 18.", "18", "18"), ("#### $1,800", "1800", "1800"), ("#### -7", "-7", "-7"), ("#### 18.00", "18", "18"),
    ("#### 5\nno\n#### 6", "6", "6"), ("#### 180", "180", "180"), ("#### 0018", "18", "18"), ("#### -0", "0", "0"), ("#### .5", "0.5", "0.5"),
    ("#### -$5.50", "-5.5", "-5.5"), ("#### \u22125", "-5", "-5"), ("#### 1\u2009800", "1800", "1800"), ("#### 18%", "18", "18"),
    ("#### 18 eggs", "18", "18"), ("The answer is 18.", None, "18"), ("so 10-3", None, "3"), ("(-3)", None, "-3"), ("", None, None),
    ("####", None, None), ("no number", None, None), ("#### x then 7", None, "7"), ("3 then #### 4 then 9", "4", "4"),
    ("#### 1,2,3", "1", "1"), ("in 2019,2020", None, "2020"), ("#### 7" + " x" * 200, None, "7"), ("1,234,567.0", None, "1234567"), ("\\$12", None, "12"), ("9" * 10000, None, "9" * 10000),
]


@pytest.mark.parametrize("text,strict,lenient", ANSWERS, ids=lambda x: repr(x)[:20])
def test_extract_answer(text, strict, lenient):
    assert gsm8k.extract_answer(text) == strict and gsm8k.extract_answer(text, strict=False) == lenient


def problem(answer, **row):
    return {"prompt": "?", "answer": answer, "boxed": False, "gold": gsm8k.extract_answer(answer, strict=False)} | row


@pytest.mark.parametrize("text,answer,scores", [("#### $18.00", "He has 9 * 2 = <<9*2=18>>18\n#### 18", (1, 1, 1)), ("#### 180", "#### 18", (0, 0, 1)), ("#### 8", "#### 18", (0, 0, 1)),
                                                ("it is 18", "#### 18", (0, 1, 0)), ("", "#### 18", (0, 0, 0)), ("#### eighteen", "18", (0, 0, 0)), ("#### 18" + " x" * 200, "18", (0, 1, 0))], ids=str)
def test_scores_compare_values_not_spellings(text, answer, scores):
    """strict, lenient, and format, which pays for an answer line whatever its value."""
    assert tuple(gsm8k.score(text, problem(answer)).values()) == scores


@needs_assets
def test_gold_answers_of_gsm8k():
    """Every one of the 8,792 solutions gives its own gold answer in strict mode."""
    rows = [row for split in ("train", "test") for row in gsm8k.read_problems(ASSETS / "gsm8k" / f"{split}.jsonl")]
    assert len(rows) == 8792
    for row in rows:
        assert gsm8k.extract_answer(row["answer"]) == row["answer"].split("#### ")[1].replace(",", "") == row["gold"]
        assert gsm8k.score(row["answer"], row) == {"strict": 1.0, "lenient": 1.0, "format": 1.0}


def test_stop_ids_come_from_everywhere(tmp_path):
    """Bug 3: generation_config.json (a list or one id), config.json, the tokenizer's eos_token and the known end-of-turn names."""
    folder = shutil.copytree(TOY, tmp_path / "m")
    end, turn = (gsm8k.Chat(TOY).tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    assert gsm8k.Chat(folder).stop_ids == {end, turn}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (folder / "config.json").write_text('{"eos_token_id": 11}')
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "Q"}
    config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ eos_token }}{{ messages[0].content }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    chat = gsm8k.Chat(folder)
    assert chat.stop_ids == {end, turn, 7, 9, 11, chat.tokenizer.token_to_id("Q")} and chat.text("x") == "Qx"
    (folder / "chat_template.jinja").write_text("jinja file: {{ messages[0].content }}")
    assert gsm8k.Chat(folder).text("x") == "jinja file: x"


@needs_assets
def test_real_qwen_template_and_stop_ids():
    """Bugs 3, 20: both of Qwen2.5's stop ids, 151,665 real ids, its template with and without a system message."""
    chat = gsm8k.Chat(ASSETS / "qwen2.5")
    assert chat.stop_ids == {151645, 151643} and chat.vocab == 151665
    assert chat.text(Q) == ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                               'Q? Let\'s think step by step and output the final answer after "####".<|im_end|>\n<|im_start|>assistant\n')
    assert chat.text(Q, "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert chat.prompt(Q)[:3] == [151644, 8948, 198]


def test_text_after_the_stop_token_is_not_decoded():
    """Bug 4: neither the stop token nor what follows it reaches the scorer."""
    chat = gsm8k.Chat(TOY)
    ids = chat.tokenizer.encode("#### 12<|im_end|>#### 99").ids
    mask = torch.arange(len(ids)) <= ids.index(chat.tokenizer.token_to_id("<|im_end|>"))
    assert chat.decode(torch.tensor(ids), mask) == "#### 12"


def test_templates_cannot_run_code(tmp_path):
    """A chat template comes with the model: in the sandbox it formats messages and nothing else."""
    for template in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{% if %}", "{{ cycler.__init__.__globals__ }}", "{{ 1 / 0 }}"):
        folder = shutil.copytree(TOY, tmp_path / str(abs(hash(template))))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(InputError, match="template fails"):
            gsm8k.Chat(folder).text("Q?")


@pytest.mark.parametrize("content,words", [("", ["no problems"]), ("{}\n", ["line 1", "question"]), ('{"question": "a", "answer": "1"}\n{bad\n', ["line 2", "JSON"]),
                                           ('{"question": "a", "answer": "#### 1"}\n\n[1]\n', ["line 3"]), ('{"question": "a", "answer": "none"}', ["line 1", "number"])])
def test_malformed_data_names_the_line(content, words, tmp_path):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(InputError) as error:
        gsm8k.load_data(str(tmp_path))
    assert all(word in str(error.value) for word in ["train.jsonl", *words])


@pytest.fixture
def server(tmp_path):
    """A web server on loopback over tmp_path/www; yields its address."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    handler.log_message = lambda *a: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def test_a_download_cut_short_leaves_nothing(tmp_path, monkeypatch):
    """The server promises more bytes than it sends."""
    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

        def log_message(self, *args):
            pass
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Short) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(gsm8k, "URL", f"http://127.0.0.1:{httpd.server_port}/")
        with pytest.raises(InputError, match="cannot be downloaded"):
            gsm8k.load_data("gsm8k")
        httpd.shutdown()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_download_is_checked_and_cached(server, tmp_path, monkeypatch):
    """A changed file is refused and leaves nothing; a good one is fetched once; no network is one clear line."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gsm8k, "URL", server)
    for name in gsm8k.SHA256:
        shutil.copy(TOY / name, tmp_path / "www" / name)
    with pytest.raises(InputError, match="sha256"):
        gsm8k.load_data("gsm8k")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    monkeypatch.setattr(gsm8k, "SHA256", {n: gsm8k.hashlib.sha256((TOY / n).read_bytes()).hexdigest() for n in ("train.jsonl", "test.jsonl")})
    assert len(gsm8k.load_data("gsm8k")[1]) == 1000
    monkeypatch.setattr(gsm8k, "URL", "http://127.0.0.1:9/")  # nobody listens there
    assert len(gsm8k.load_data("gsm8k")[0]) == 4000
    os.truncate(tmp_path / "cache" / "gsm8k" / "test.jsonl", 100)  # a half file is not trusted
    with pytest.raises(InputError, match="cannot be downloaded"):
        gsm8k.load_data("gsm8k")


# ------------------------------------------------------------------------------------------------ toy, train.py

def test_toy_is_held_out_and_small(tmp_path):
    """make.py makes these very problems; no test question is in the training file; the model fits 8 MB; digits are split one by one; make.py uses the paper's instruction."""
    train_set, test_set = gsm8k.load_data(str(TOY))
    assert len(test_set) >= 500 and not {p["prompt"] for p in train_set} & {p["prompt"] for p in test_set}
    assert (TOY / "model.safetensors").stat().st_size <= 8e6
    chat = gsm8k.Chat(TOY)
    assert [t for t in chat.tokenizer.encode("12 345").tokens if t.isdigit()] == list("12345")
    spec = importlib.util.spec_from_file_location("make", TOY / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.INSTRUCTION == gsm8k.INSTRUCTION
    assert chat.text(Q) == make.chat("Q?", "", make.DEFAULT_SYSTEM)[0]
    held_out = make.write_problems(Path(tmp_path), np.random.RandomState(0))
    assert all((tmp_path / name).read_bytes() == (TOY / name).read_bytes() for name in ("train.jsonl", "test.jsonl")) and len(held_out) == 1000
    problems = [make.problem(np.random.RandomState(i)) for i in range(300)]
    for _, steps, _ in problems:
        assert all({"+": a + b, "-": a - b}[sign] == c >= 0 for a, sign, b, c in steps)


def test_toy_can_but_does_not():
    """Told to be careful it is right at least 99% of the time; left alone, less than half."""
    model, chat, problems = transformer.load(TOY), gsm8k.Chat(TOY), gsm8k.load_data(str(TOY))[1][:300]
    args = train.parse(["--out", "unused"])
    score = {}
    for args.system in ("You are a careful assistant. You write down every step.", None):
        score[args.system] = [train.evaluate(model, chat, problems, args, "", sampled)["strict"] for sampled in (False, True)]
    careful, alone = score.values()
    assert careful[0] >= 0.99 and max(alone) <= 0.5, score


TINY_RUN = ["--steps", "2", "--prompts", "4", "--group", "4", "--max-new-tokens", "24", "--eval-count", "8"]


def test_a_short_run_writes_everything(tmp_path, capsys):
    """The whole of train.py, tiny: files, one log row a step, the adapter evaluates to the run's own final score."""
    out = tmp_path / "run"
    assert train.main(["--params", "13", *TINY_RUN, "--seed", "5", "--eval-every", "1", "--v-dtype", "bf16", "--out", str(out)]) == 0
    summary, log = json.loads((out / "summary.json").read_text()), [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert summary["params"] == 13 and summary["adapter_bytes"] == 26 and summary["eval_count"] == 8 and summary["steps"] == 2 == len(log)
    keys = "params adapter_bytes base_strict base_lenient final_strict final_lenient base_sampled final_sampled eval_count steps tokens seconds seed model data"
    assert set(keys.split()) <= set(summary) and summary["tokens"] == sum(row["tokens"] for row in log)
    assert log[0]["gap"] < 1e-5 and "eval_strict" in log[0] and log[1]["lr"] > 0
    assert json.loads((out / "config.json").read_text())["seed"] == 5
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith("<|im_start|>assistant\n") and sample["response"]
    text = capsys.readouterr().out
    assert "13 trainable numbers, 26 bytes" in text and "+-" in text and "next: python train.py --eval-only" in text
    again, command = tmp_path / "again", shlex.split(text.split("next: python train.py ")[1])
    assert train.main([*command, "--out", str(again)]) == 0
    result = json.loads((again / "summary.json").read_text())
    assert (result["strict"], result["sampled"]) == (summary["final_strict"], summary["final_sampled"])  # bug 24: fixed questions, fixed noise
    assert train.main(["--params", "13", *TINY_RUN, "--out", str(out)]) == 2  # a run is never written over
    assert "holds a run already" in capsys.readouterr().err


def test_every_other_flag_reaches_the_run(tmp_path):
    """--tie, --kl, --recompute, --reward lenient, --system, --minibatches; then training on from the adapter it made."""
    assert train.main([*TINY_RUN, "--params", "14", "--tie", "structured", "--kl", "0.01", "--recompute", "--reward", "lenient", "--system", "Be brief.", "--lr", "0.05",
                       "--minibatches", "2", "--rollout-rows", "8", "--tokens-per-micro-batch", "500", "--out", str(tmp_path / "a")]) == 0
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert log[1]["kl"] >= 0 and json.loads((tmp_path / "a" / "config.json").read_text())["trained"]["tie"] == "structured"
    assert all(json.loads(x)["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>") for x in (tmp_path / "a" / "samples.jsonl").read_text().splitlines())
    adapter = tmp_path / "a" / "adapter.safetensors"
    assert train.main([*TINY_RUN, "--adapter", str(adapter), "--steps", "0", "--out", str(tmp_path / "b")]) == 0
    assert torch.equal(load_file(tmp_path / "b" / "adapter.safetensors")["v"], load_file(adapter)["v"])
    assert train.main([*TINY_RUN, "--adapter", str(adapter), "--rank", "3", "--out", str(tmp_path / "c")]) == 2


METHODS = [("--method lora-xs --rank 3 --reward lenient", "lora-xs", 28 * 9), ("--method lora --rank 2 --alpha 8 --kl 0.01 --reward lenient", "lora", 2 * 9728), ("--method full --lr 1e-4 --kl 0.01 --reward lenient", "full", 862336),
           ("--algo sft --minibatches 2 --lr 0.05", "tinylora", 13), ("--algo sft --method lora --lr 1e-3 --v-dtype bf16", "lora", 9728), ("--reward format --lr 0.05", "tinylora", 13),
           ("--algo es --reward lenient --lr 0.05", "tinylora", 13)]


@pytest.mark.parametrize("flags,method,numbers", METHODS)
def test_every_method_trains_saves_and_evaluates(flags, method, numbers, tmp_path, capsys):
    """The paper's comparisons: each changes the policy, and what it saves evaluates to the run's own final scores."""
    assert train.main([*flags.split(), *TINY_RUN, "--prompts", "8", "--out", str(tmp_path / "a")]) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["method"] == method and summary["params"] == numbers
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert any(row["grad_norm"] > 0 for row in rows) and all(("loss" in row) if "sft" in flags else {"strict", "lenient", "format"} <= set(row) for row in rows)
    command = shlex.split(capsys.readouterr().out.split("next: python train.py ")[1])
    assert train.main([*command, "--out", str(tmp_path / "b")]) == 0
    again = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert [again[k] for k in ("strict", "lenient", "format", "sampled")] == [summary["final_" + k] for k in ("strict", "lenient", "format", "sampled")]
    base, trained = transformer.load(TOY), transformer.load(tmp_path / "a" / "model" if method == "full" else TOY)
    if method == "lora":
        lora.load(tmp_path / "a" / "adapter", trained)
    elif method != "full":
        tinylora.load(tmp_path / "a" / "adapter.safetensors", trained)
    assert not torch.equal(base(torch.arange(20)[None]), trained(torch.arange(20)[None]))


def test_es_climbs_a_known_hill(monkeypatch):
    """A reward that is a smooth function of each row's v: the step's gradient is its slope, and Adam goes uphill; ties give exactly 0."""
    import es
    model = tiny()
    v = random_v(tinylora.adapt(model, 5), 0.3)
    goal, seen = torch.linspace(-1, 1, 5)[:, None], {}

    def respond(rows, noise, which):
        seen["values"] = model.bank.v[torch.as_tensor(which)]
        assert np.array_equal(noise[0], noise[1]) and not np.array_equal(noise[0], noise[2])  # a pair shares its noise
        return None, torch.zeros(len(rows), 1, dtype=torch.long), torch.ones(len(rows), 1, dtype=torch.bool), None

    hill = lambda ids, mask, rows: {kind: -(seen["values"] - goal).square().sum((1, 2)) for kind in gsm8k.SCORES}
    args = train.parse(["--algo", "es", "--group", "64", "--sigma", "0.1", "--grad-clip", "1e9", "--out", "unused"])
    optimizer, start = torch.optim.AdamW([v], lr=0.05, weight_decay=0.0), v.detach().clone()
    metrics, mask = es.step(model, v, optimizer, [{}] * 64, [[0, p] for p in range(64)], args, 0.05, respond, hill)
    slope = 2 * (start - goal)  # of the loss, -reward
    assert torch.nn.functional.cosine_similarity(v.grad.flatten(), slope.flatten(), dim=0) > 0.98 and 0.8 < v.grad.norm() / slope.norm() < 1.2
    for i in range(100):
        es.step(model, v, optimizer, [{}] * 8, [[1, 8 * i + p] for p in range(8)], args, 0.05, respond, hill)
    assert (v - goal).norm() < 0.2 * (start - goal).norm()
    es.step(model, v, optimizer, [{}] * 2, [[2, p] for p in range(2)], args, 0.05, respond, lambda ids, mask, rows: {kind: torch.ones(len(rows)) for kind in gsm8k.SCORES})
    assert (v.grad == 0).all() and model.bank.v is None


def test_sft_learns_the_solutions(tmp_path):
    """Likelihood goes up on what it learns from; the targets are the file's worked solutions without calculator marks, stop token last."""
    chat, (train_set, _) = gsm8k.Chat(TOY), gsm8k.load_data(str(TOY))
    ids = chat.response(train_set[0]["prompt"], train_set[0]["solution"])
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == train_set[0]["solution"] + "<|im_end|>" and "<<" not in train_set[0]["solution"]
    assert gsm8k.score(train_set[0]["solution"], train_set[0])["strict"] == 1
    assert train.main(["--algo", "sft", "--method", "lora", "--rank", "4", "--lr", "1e-3", "--steps", "12", "--prompts", "16", "--warmup", "0", "--eval-count", "1", "--out", str(tmp_path / "a")]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_same_seed_same_run(tmp_path):
    """Two runs with one seed agree to the last bit; another seed does not."""
    got = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train.main([*TINY_RUN, "--eval-count", "1", "--lr", "0.05", "--seed", str(seed), "--out", str(tmp_path / name)]) == 0
        got.append(load_file(tmp_path / name / "adapter.safetensors")["v"])
    assert torch.equal(got[0], got[1]) and not torch.equal(got[0], got[2])


def test_model_folder_defaults_and_their_limits(tmp_path, capsys):
    """tinylora.json in a model folder sets flags; the command line wins; it may not name outputs or unknown flags."""
    folder = shutil.copytree(TOY, tmp_path / "m")
    (folder / "tinylora.json").write_text(json.dumps({"steps": 7, "lr": 0.5, "data": ".", "max-new-tokens": 33}))
    args = train.parse(["--model", str(folder), "--lr", "0.25"])
    assert (args.steps, args.lr, args.max_new_tokens, args.group) == (7, 0.25, 33, 4) and Path(args.data) == folder
    for bad in ({"out": "/tmp/x"}, {"no-such-flag": 1}, {"steps": "many"}, {"tie": "knotted"}, {"lr": [1]}):
        (folder / "tinylora.json").write_text(json.dumps(bad))
        assert train.main(["--model", str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_help_fits_two_screens(monkeypatch, capsys):
    """Two screens of 48 lines, 80 columns, nothing wider; every flag with a text of its own, in its group."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and len(text.splitlines()) <= 96 and max(map(len, text.splitlines())) <= 80
    blocks = dict(block.split(":\n", 1) for block in text.split("\n\n") if re.match(r"[a-z].*:\n  -", block))
    assert list(blocks) == ["options", "model and data", "what is trained (tinylora.py, lora.py)", "learning (grpo.py)", "evaluation, memory, output"]
    shown = re.findall(r"^  --(\S+)[^\n]*?(?:  |\n {24})(?=\S)", "\n".join(blocks.values()), re.M)
    args = train.parse(["--out", "unused"])
    assert sorted(shown) == sorted(name.replace("_", "-") for name in vars(args))


@pytest.mark.parametrize("flags", [["--params", "0"], ["--params", "1e3"], ["--params", "-1"], ["--group", "1"], ["--steps", "x"], ["--lr", "0"], ["--lr", "nan"],
                                   ["--temperature", "0"], ["--tie", "structured"], ["--params", "13", "--u", "2"], ["--rank", "999"], ["--seed", "-1"], ["--seed", "4294967296"], ["--u", "3"], ["--device", "mps"],
                                   ["--prompts", "5", "--minibatches", "2"], ["--adapter", "nowhere.safetensors"], ["--data", "nowhere"], ["--nonsense"],
                                   ["--model", "nowhere"], ["--model", "no-such-owner/no-such-model"], ["--device", "abacus"], ["--kl", "-1"], ["--steps", "-1"],
                                   ["--out", "/proc/nowhere"], ["--method", "lora", "--params", "13"], ["--method", "full", "--rank", "2"], ["--alpha", "3"], ["--method", "full", "--dtype", "bf16"],
                                   ["--method", "lora", "--rank", "999"], ["--method", "lora", "--adapter", str(ROOT / "results" / "toy-seed0" / "adapter.safetensors")], ["--adapter", str(TOY)],
                                   ["--data", str(TOY / "test.jsonl")], ["--algo", "dpo"], ["--algo", "es", "--group", "3"], ["--algo", "es", "--method", "lora"], ["--algo", "es", "--kl", "0.1"], ["--adapter", str(TOY / "model.safetensors")], ["--eval-count", "0"], ["--cuda-graph"]], ids=" ".join)
def test_silly_flags_end_in_one_line(flags, tmp_path, capsys, monkeypatch):
    """Exit code 2 and one line, never a traceback."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train.main(["--out", str(tmp_path / "out"), "--eval-count", "2", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message


def test_chat_answers_as_the_base_and_as_the_adapter(tmp_path, capsys, monkeypatch):
    """Side by side: each column is what that model alone says; v (or B) is back in its place afterwards; terminal codes are shown, not obeyed."""
    question = "Tom has 3 apples and buys 4 more. How many apples does Tom have now?"
    args = train.parse(["--out", "unused", "--max-new-tokens", "40"])
    text = gsm8k.Chat(TOY)

    def alone(model):
        ids, mask, _ = grpo.generate(model, [text.prompt(question + gsm8k.INSTRUCTION)], 1, 40, text.stop_ids, vocab=text.vocab)
        return text.decode(ids[0], mask[0])
    model = transformer.load(TOY)
    base = alone(model)
    v = tinylora.load(ROOT / "results" / "toy-seed0" / "adapter.safetensors", model)
    kept = v.clone()
    assert chat.answers(model, text, [v], args, question) == {"base": base, "adapted": alone(model)} and torch.equal(v, kept)
    assert chat.answers(transformer.load(TOY), text, [], args, question) == {"base": base}
    model = transformer.load(TOY)
    params = lora.adapt(model, 2)
    for i, p in enumerate(params[1::2]):
        random_v(p, 0.01, seed=i)
    assert chat.answers(model, text, params, args, question) == {"base": base, "adapted": alone(model)} and alone(model) != base
    monkeypatch.setattr(text, "decode", lambda ids, mask: "a\x1b[31m\nb")
    assert chat.answers(model, text, [], args, question) == {"base": "a\\x1b[31m\nb"}
    lines = chat.columns({"base": "one two three\n\nfour", "adapted": "five"}, 23)
    assert lines == ["base         adapted", "----------   ----------", "one two      five", "three", "", "four"]
    typed = iter([question, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert train.main(["--chat", "--max-new-tokens", "40", "--adapter", str(ROOT / "results" / "toy-seed0" / "adapter.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "base" in out and "adapted" in out and base.split()[0] in out


def test_rows_go_to_wandb_and_tensorboard_when_asked(tmp_path, monkeypatch, capsys):
    """Both get every number of every row, by stand-ins; what is not installed is told in one line before the model is read; off by default."""
    from types import SimpleNamespace as Fake
    got, events = [], []
    writer = Fake(add_scalar=lambda name, value, step: events.append((name, value, step)), flush=lambda: events.append("flush"))
    monkeypatch.setitem(sys.modules, "wandb", Fake(init=lambda **kw: got.append(kw), log=lambda row, step: got.append((row, step))))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Fake(SummaryWriter=lambda folder: writer))
    assert train.main([*TINY_RUN, "--steps", "2", "--out", str(tmp_path / "run"), "--wandb", "mine", "--tensorboard"]) == 0
    rows = [{k: x for k, x in json.loads(line).items() if x is not None} for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert got[0]["project"] == "mine" and got[0]["config"]["lr"] and got[1:] == [(row, row["step"]) for row in rows]
    assert [e for e in events if e != "flush"] == [(k, x, row["step"]) for row in rows for k, x in row.items()] and events.count("flush") == 2
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for flags in (["--wandb", "mine"], ["--tensorboard"]):
        capsys.readouterr()
        assert train.main([*TINY_RUN, "--out", str(tmp_path / flags[0]), *flags]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {flags[0]}: ") and message.count("\n") == 1
    got.clear()
    assert train.main([*TINY_RUN, "--steps", "1", "--out", str(tmp_path / "quiet")]) == 0 and not got


def test_plot_draws_seeds_as_one_setting(tmp_path):
    """Five seeds are one line with a band; a run still going on (no summary) and one of --algo sft are drawn too."""
    pytest.importorskip("matplotlib")
    assert train.main([*TINY_RUN, "--steps", "1", "--algo", "sft", "--out", str(tmp_path / "sft")]) == 0
    shutil.copytree(ROOT / "results" / "toy-seed0", tmp_path / "going")
    (tmp_path / "going" / "summary.json").unlink()
    seeds = sorted(str(path) for path in (ROOT / "results").glob("toy-seed*"))
    for runs, words in ((seeds, "5 runs of 1 setting"), ([*seeds, str(tmp_path / "sft"), str(tmp_path / "going")], "7 runs of 2 settings")):
        done = subprocess.run([sys.executable, str(ROOT / "results" / "plot.py"), *runs, str(tmp_path / "p.png")], capture_output=True, text=True)
        assert done.returncode == 0 and words in done.stdout and (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG"), done


def start(*flags, **kw):
    kw.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background job would ignore it
    return subprocess.Popen([sys.executable, "-u", str(ROOT / "train.py"), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def read_terminal(master):
    try:
        return master.read(4096)
    except OSError:  # how Linux says that nobody writes there any more
        return b""


def test_the_live_line(tmp_path):
    """A terminal: the line moves within one chunk of rows, with the time left, fits 80 columns, and leaves nothing behind. A pipe: the same rows, no line at all."""
    import fcntl, pty, struct, termios
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command, env = [sys.executable, "train.py", *TINY_RUN, "--out"], os.environ | {"TQDM_MININTERVAL": "0"}
    process = subprocess.Popen([*command, str(tmp_path / "1")], stdout=terminal, stderr=terminal, cwd=ROOT, env=env)
    os.close(terminal)
    with open(master, "rb", buffering=0) as screen:
        text = b"".join(iter(lambda: read_terminal(screen), b"")).decode()
    assert process.wait() == 0
    for label, rows in (("evaluation, greedy", 8), ("evaluation at T = 1", 8), ("step 1", 16)):  # each of them one chunk
        frames = re.findall(rf"\r{label}: +(\d+)%\|[^|]*\| \d\d:\d\d<\d\d:\d\d, (\d+)/{rows} rows, token (\d+) of 24", text[:text.index("step   1")])
        percent, done, tokens = ([int(x) for x in column] for column in zip(*frames))
        assert set(tokens) >= {4, 8, 12, 16} and percent == sorted(percent) and max(percent) > min(percent) and max(done) <= rows
    assert max(len(frame) for frame in re.split("[\r\n]", text) if "%|" in frame) <= 80
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part):]  # what a terminal does: it writes over what was there
        lines.append(shown.rstrip())
    piped = subprocess.run([*command, str(tmp_path / "2")], capture_output=True, text=True, cwd=ROOT, env=env)
    assert piped.returncode == 0 and piped.stderr == "" and not re.search("[\r\x1b]|%\\|", piped.stdout)
    same = lambda lines: [re.sub(r" *[\d.]+", "#", line.rstrip()) for line in lines]  # times differ
    assert same(lines) == same(piped.stdout.split("\n")) and len(lines) > 10


def test_ctrl_c_keeps_the_adapter_and_the_log(tmp_path):
    """Interrupted in the middle of training: exit 130, no traceback, adapter and log so far are there."""
    process = start("--steps", "1000", "--prompts", "4", "--group", "4", "--eval-count", "2", "--lr", "0.05", "--out", str(tmp_path / "run"))
    for line in process.stdout:
        if line.startswith("step   3"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 3
    v, _ = tinylora.read(tmp_path / "run" / "adapter.safetensors")
    assert v.numel() == 13 and v.abs().max() > 0


def test_full_disk_ends_in_one_line(tmp_path):
    """No file may grow past 6 kB, as on a full disk: exit 2, one line that names the file; log rows are whole, the adapter is kept."""
    import resource
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    process = start(*TINY_RUN, "--steps", "100", "--out", str(tmp_path / "run"), preexec_fn=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors and errors.strip().count("\n") == 0
    assert errors.startswith("error: ") and "log.jsonl" in errors
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) > 5 and not list((tmp_path / "run").glob("*.tmp*"))
    assert tinylora.read(tmp_path / "run" / "adapter.safetensors")[0].numel() == 13


def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path, monkeypatch, capsys):
    """A traceback; or, on a read-only disk, where even removing what is not there fails, the clearing up told in place of the cause.
    EROFS by stand-ins: the tests may run as root, whom permissions do not bind."""
    def refuse(path, *args, **kw):
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    file, there, new = tmp_path / "file", tmp_path / "there", tmp_path / "new"
    file.write_text("x")
    there.mkdir()
    begun = "there/config.json: cannot be written ([Errno 30] Read-only"
    for out, refused, words in ((file / "run", (), "run: cannot be made a folder (Not a dir"), (file, (), "file: cannot be made a folder (File exists"),
                                (new, ("mkdir",), "new: cannot be made a folder (Read-only"), (there, ("write_text", "unlink"), begun)):
        with monkeypatch.context() as patch:
            for name in refused:
                patch.setattr(Path, name, refuse)
            assert train.main(["--eval-only", "--eval-count", "1", "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1 and words in message, message
    with monkeypatch.context() as patch, pytest.raises(InputError, match="log.jsonl: cannot be written .*Read-only.*--resume"):  # by now it is
        patch.setattr("builtins.open", refuse)
        train.state.append(there / "log.jsonl", [{}])
    with monkeypatch.context() as patch:  # and before a model of gigabytes is fetched
        patch.setattr(os, "access", lambda path, mode: Path(path) != there)
        patch.setattr("flags.find_model", lambda name: pytest.fail("fetched"))
        assert train.main(["--model", "some/model", "--out", str(there / "a" / "b")]) == 2
    assert "there cannot be written" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == [file, there]


MAIN = sorted(path.name for path in ROOT.glob("*.py") if not path.name.startswith("test_"))


@pytest.mark.parametrize("name", MAIN)
def test_files_stay_short_and_light(name):
    """350 lines at most, and nothing imported beyond torch, safetensors, tokenizers, numpy and what those bring."""
    import ast
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= 350
    found = {(n.module if isinstance(n, ast.ImportFrom) else a.name).split(".")[0]
             for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    allowed = {"torch", "safetensors", "tokenizers", "numpy", "huggingface_hub", "tqdm", "jinja2", *(Path(main).stem for main in MAIN),
               "wandb"}  # the last only when --wandb asks for it
    assert found - allowed <= set(sys.stdlib_module_names)


def test_the_readmes_figures_are_the_results():
    """Its tables are what the committed runs say, and its list of files is right: a run made anew must not leave an old figure behind."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = {path.parent.name: json.loads(path.read_text()) for path in ROOT.glob("results/*/summary.json")}
    lines = [f"| {seed} | " + " | ".join(f"{s[f'base_{kind}']:.3f}, {s[f'final_{kind}']:.3f}" for kind in ("strict", "lenient", "sampled")) + " |"
             for seed, s in ((i, runs[f"toy-seed{i}"]) for i in range(5))]
    for flags, name, when in (("untrained", "toy-seed0", "base"), ("`--params 13`", "toy-seed0", "final"), ("`--method lora-xs --lr 0.02`", "compare-xs", "final"),
                              ("`--method lora --lr 1e-3`", "compare-lora", "final"), ("`--method full --lr 1e-4`", "compare-full", "final"),
                              ("`--params 13 --reward format`", "compare-format", "final"), ("`--params 13 --algo sft`", "compare-sft", "final"),
                              ("`--algo sft --method lora --lr 1e-3`", "compare-sft-lora", "final")):
        s = runs[name]
        kinds = [f"{s[f'{when}_{kind}']:.3f}" for kind in ("strict", "lenient", "format", "sampled", "sampled_format")]
        lines.append(f"| {flags} | {s['params'] if when == 'final' else 0:,} | " + " | ".join(kinds) + " |")
    for algo, name in (("ES", "es-seed{}"), ("GRPO", "toy-seed{}")):
        lines.append(f"{algo} " + ", ".join(f"{s['final_strict']:.3f} and {s['final_sampled']:.3f}" for s in (runs[name.format(i)] for i in range(3))))
    lines += [f"| [{name}]({name}) | {len((ROOT / name).read_text(encoding='utf-8').splitlines())} |" for name in [*MAIN, "toy/make.py"]]
    s = runs["toy-seed0"]
    lines.append(f"from {s['base_strict']:.1%} to {s['final_strict']:.1%} of 500 held-out problems, greedy ({s['base_sampled']:.1%} to {s['final_sampled']:.1%} sampled at T = 1)")
    flat = " ".join(readme.split())
    assert not [line for line in lines if line not in flat.replace(" for seeds 0, 1, 2", "")]
