"""The spec as tests: python -m pytest test_tinylora.py

They need the five files beside this one, support/ and toy/, and use the plain engine only. A
docstring names the bugs that the test catches, with their numbers in the list of tests/README.md.
"""
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # before torch is imported

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import grpo
import gsm8k
import model as transformer
import tinylora
import train
from support.chat_format import Chat
from support.checkpoint import Config
from support.errors import InputError

torch.set_num_threads(1)  # in so small models, threads only wait for each other
TOY = Path(__file__).resolve().parent / "toy"
QWEN = Config("qwen2", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6,
              rope_theta=1e4, rope_scaling=None, tie_word_embeddings=True)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10]]
ARGS = SimpleNamespace(clip_low=0.2, clip_high=0.4, kl=0.0, grad_clip=1e30, v_dtype="fp32",
                       tokens_per_micro_batch=10**9, recompute=False)


def randomize(x, scale, seed=0):
    """Fill a tensor with fixed random numbers; in fp64 too they are numbers that fp32 has."""
    numbers = np.random.RandomState(seed).standard_normal(x.shape) * scale
    x.data.copy_(torch.from_numpy(numbers).float())
    return x


def tiny(config=QWEN, dtype=torch.float32):
    """A random model. Norms and biases are random too: at 1 and 0 they would hide bug 21."""
    model = transformer.Transformer(config)
    for i, (name, p) in enumerate(model.named_parameters()):
        randomize(p, 0.3 if p.dim() == 2 else 0.5, seed=i)
        p.data += 1.0 if "norm" in name else 0.0
    return model.to(dtype).requires_grad_(False).eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]


def sample(model, prompts=PROMPTS, group=4, length=12, temperature=1.0, stops=(0, 3)):
    noise = np.random.RandomState(0).random_sample((len(prompts) * group, length))
    return grpo.generate(model, prompts, group, length, stops, temperature, noise)


def test_cache_equals_one_pass():
    """Bugs 2, 17, 18, 19: prompts of unequal length in the cache, continued by further tokens,
    give the logits of each row alone. Token 0, which padding uses too, is a real token here."""
    model = tiny(dtype=torch.float64)
    rows = [list(np.random.RandomState(i).randint(0, 50, n)) for i, n in enumerate((11, 7, 10, 9))]
    rows[1][2] = 0
    whole = [model(torch.tensor([row]))[0] for row in rows]  # (T, vocab) each
    cache = transformer.Cache(model, batch=4, size=20)
    done = [0, 0, 0, 0]
    for counts in ([6, 3, 8, 1], [1, 1, 1, 1], [2, 0, 1, 2], [1, 1, 0, 1], [1, 1, 0, 1]):
        parts = [row[d:d + n] for row, d, n in zip(rows, done, counts)]
        logits = model(transformer.pad(parts, "cpu"), cache, torch.tensor(counts))
        for i, n in enumerate(counts):
            want = whole[i][done[i]:done[i] + n]
            torch.testing.assert_close(logits[i, :n], want, atol=1e-11, rtol=1e-11)
        done = [d + n for d, n in zip(done, counts)]
    assert cache.lengths.tolist() == done


def test_the_layer_is_the_formula():
    """y = W x + U S R V^T x with R = sum v_i P_i / sqrt(u): S used once, R not transposed, W's
    bias kept, each column of U sums to a positive number, module i has tie i // n_tie."""
    model = tiny()
    v = randomize(tinylora.adapt(model, u=3, n_tie=5, rank=2, seed=7), 0.3)
    golden = [0.37626179, -0.0987307]  # P's first numbers, on every machine
    assert layers(model)[0].P.flatten()[:2].tolist() == pytest.approx(golden, rel=1e-6)
    for i, layer in enumerate(layers(model)):
        W = layer.base.weight
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        sign = U[:, :2].sum(0).sign()  # the rule for what an SVD leaves open
        P = torch.from_numpy(np.random.RandomState([1, 7, i, 0]).standard_normal((3, 2, 2)))
        R = sum(v[i // 5, k] * P[k].float() for k in range(3)) / math.sqrt(3)
        change = (U[:, :2] * sign) @ torch.diag(S[:2]) @ R @ torch.diag(sign) @ Vt[:2]
        x = torch.randn(4, W.shape[1])
        want = torch.nn.functional.linear(x, W + change, layer.base.bias)
        torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_v_is_the_base_model_bit_for_bit(dtype):
    """Bug 15: before the first update, logits and sampled text are exactly the base model's."""
    base = tiny(dtype=dtype)
    model = tiny(dtype=dtype)
    assert (tinylora.adapt(model, 13) == 0).all()
    assert torch.equal(base(torch.arange(24)[None]), model(torch.arange(24)[None]))
    assert torch.equal(sample(base).logp, sample(model).logp)


@pytest.mark.parametrize("blocks", [4, 28, 36])
def test_params_are_exact(blocks):
    """--params N trains exactly N numbers, for the depth of the toy, of Qwen2.5-7B and of 3B."""
    modules = 7 * blocks
    for n in (1, 13, 64, 98, 504):
        with torch.device("meta"):  # shapes only
            model = transformer.Transformer(replace(QWEN, num_hidden_layers=blocks))
        v = tinylora.adapt(model, params=n)
        assert [p for p in model.parameters() if p.requires_grad] == [v] and v.numel() == n
        ties = max(d for d in range(1, modules + 1) if n % d == 0)
        tie_of = [layer.tie for layer in layers(model)]
        assert tuple(v.shape) == (ties, n // ties) and len(tie_of) == modules
        assert tie_of == sorted(tie_of) and set(tie_of) == set(range(ties))
        n_tie = math.ceil(modules / ties)
        if math.ceil(modules / n_tie) == ties:  # the paper's rule
            assert tie_of == [i // n_tie for i in range(modules)]
        else:
            sizes = [tie_of.count(tie) for tie in range(ties)]
            assert max(sizes) - min(sizes) <= 1


def test_tying_by_hand():
    """--n-tie, --u and --tie structured; InputError for wishes that contradict each other."""
    assert tinylora.plan(28, params=13)[0] == [i // 16 for i in range(196)]  # the 13 of the title
    assert tinylora.plan(28, n_tie=128)[0] == [0] * 128 + [1] * 68  # figure 1, at 2 numbers
    tie_of, ties, u, n_tie = tinylora.plan(28, n_tie=16, tying="structured")
    assert (ties, u, n_tie) == (14, 1, 16)
    assert tie_of[:7] == [0, 2, 4, 6, 8, 10, 12] and tie_of[-7:] == [1, 3, 5, 7, 9, 11, 13]
    assert tinylora.plan(4, 26, 2)[1:3] == tinylora.plan(4, 26, 2, 0)[1:3] == (13, 2)  # 0: None
    assert tinylora.plan(4, n_tie=7, u=3)[1:3] == (4, 3)
    for wrong in ({"tying": "structured"}, {"params": 13, "n_tie": 7}, {"u": 2}):
        with pytest.raises(InputError):
            tinylora.plan(4, **wrong)


def test_the_file_is_26_bytes_and_travels(tmp_path):
    """Another process rebuilds the same logits from it; another base model is refused."""
    model = transformer.load(TOY)
    v = randomize(tinylora.adapt(model, 13, seed=3), 0.1)
    path = tmp_path / "a.safetensors"
    tinylora.save(path, v, model, "bf16")
    data = path.read_bytes()
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == 26
    rounded = v.detach().bfloat16()
    assert torch.equal(load_file(path)["v"], rounded.flatten())
    v.data = rounded.float()
    code = ("import sys, torch, model, tinylora; from safetensors.torch import save_file;"
            "torch.set_num_threads(1); m = model.load('toy'); tinylora.load(sys.argv[1], m);"
            "save_file({'y': m(torch.arange(20)[None])}, sys.argv[2])")
    command = [sys.executable, "-c", code, path, tmp_path / "y"]
    subprocess.run(command, check=True, cwd=TOY.parent)
    assert torch.equal(load_file(tmp_path / "y")["y"], model(torch.arange(20)[None]))
    with pytest.raises(InputError, match="another base model"):
        tinylora.load(path, tiny())


def test_draw_samples_the_full_softmax():
    """Bugs 7, 22: frequencies are the probabilities, also of rare tokens, and a token of
    probability 0 is never drawn, even by the smallest and the largest uniform number."""
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.1999, 0.0001, 0.0])
    uniform = torch.linspace(0, 1, 200001, dtype=torch.float64)
    uniform[-1] = 1 - 2.0**-53
    tokens = grpo.draw(p.log().expand(len(uniform), -1), uniform)
    share = torch.bincount(tokens, minlength=7) / len(uniform)
    torch.testing.assert_close(share, p, atol=2e-5, rtol=0)
    assert share[0] == share[2] == share[6] == 0


def test_sampler_and_trainer_are_one_policy():
    """Bugs 2, 6, 19: the trainer's log-probs of a ragged batch are the sampler's. Bug 20: ids that
    the tokenizer does not have (45 to 49) have no part in the softmax and are never drawn."""
    model = tiny()
    model.vocab = 45
    randomize(tinylora.adapt(model, 13), 0.3)
    for temperature in (1.0, 0.5, 2.0):
        data = sample(model, temperature=temperature)
        assert not data.mask.all() and data.logp[data.mask].std() > 0 and data.ids.max() < 45
        logp = grpo.logprobs(model, data)
        torch.testing.assert_close(logp, data.logp, atol=2e-5, rtol=1e-5)
    at_one = grpo.logprobs(model, replace(data, temperature=1.0))
    assert not torch.allclose(logp, at_one, atol=1e-2)
    each = torch.arange(45)[:, None]
    data = grpo.Rollout([[1, 2, 3]] * 45, each, each >= 0, each * 0.0, temperature=2.0)
    assert grpo.logprobs(model, data).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_response_ends_with_one_stop_token():
    """Bugs 1, 3: every stop id ends a row, the stop token is in the mask, nothing after it is."""
    data = sample(tiny(replace(QWEN, vocab_size=8)), [[1, 2, 4]], group=64, length=20)
    ends = set()
    for ids, mask in zip(data.ids, data.mask):
        n = int(mask.sum())
        assert mask[:n].all() and not torch.isin(ids[:n - 1], torch.tensor([0, 3])).any()
        if n < 20:
            ends.add(int(ids[n - 1]))
    assert ends == {0, 3}
    assert (data.logp[~data.mask] == 0).all() and (data.logp[data.mask] < 0).all()


def test_advantages():
    """Bug 11: standardised within the group; exactly 0 for equal rewards and a group of one."""
    got = grpo.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]))
    assert got[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-4)
    assert (got[1] == 0).all() and (grpo.advantages(torch.tensor([[0.3], [1.0]])) == 0).all()
    for group in range(2, 33):  # the mean of equal rewards is not always the reward
        assert (grpo.advantages(torch.full((1, group), 0.1)) == 0).all()


def test_loss_by_hand():
    """Bug 10: the low clip with A < 0, the high one with A > 0, one denominator, masks, k3."""
    old = torch.zeros(2, 3)
    logp = torch.tensor([[2.0, 1.3, 0.5], [0.5, 0.9, 2.0]]).log()  # the ratios, as old is 0
    mask = torch.tensor([[True, True, True], [True, True, False]])
    data = grpo.Rollout([[1], [1]], old.long(), mask, old, 1.0, torch.tensor([1.0, -2.0]))
    want = -((1.4 + 1.3 + 0.5) + (-2 * 0.8 + -2 * 0.9)) / 5
    assert grpo.grpo_loss(logp, data, 5, ARGS).item() == pytest.approx(want, rel=1e-6)
    garbage = logp.masked_fill(~mask, math.inf)
    assert grpo.grpo_loss(garbage, data, 5, ARGS).item() == pytest.approx(want, rel=1e-6)
    assert grpo.grpo_loss(logp, replace(data, mask=mask & False), 1, ARGS) == 0
    with_kl = SimpleNamespace(**vars(ARGS) | {"kl": 0.1})
    k3 = sum(math.exp(-x) + x - 1 for x in logp[mask].tolist())
    loss = grpo.grpo_loss(logp, replace(data, ref_logp=old), 5, with_kl)
    assert loss.item() == pytest.approx(want + 0.1 * k3 / 5, rel=1e-5)


def off_policy(dtype):
    """(model, v, rollout): v has changed since the sampling, so ratios are not 1."""
    model = tiny(dtype=dtype)
    v = tinylora.adapt(model, 5)
    v.data = v.data.to(dtype)
    for layer in layers(model):
        layer.P = layer.P.to(dtype)
    randomize(v, 0.05, seed=1)
    data = sample(model, temperature=0.8)
    reward = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])
    data.advantage = grpo.advantages(reward).flatten().to(dtype)
    v.data.zero_()
    data.ref_logp = grpo.logprobs(model, data).detach()
    randomize(v, 0.05, seed=2)
    return model, v, data


def gradient(model, v, data, **changes):
    """(v's gradient, what update returned); the learning rate is 0, so v stays."""
    args = SimpleNamespace(**vars(ARGS) | changes)
    result = grpo.update(model, torch.optim.AdamW([v], lr=0.0, weight_decay=0.0), data, args, grpo)
    return v.grad.clone(), result


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_gradient_equals_finite_differences(kl):
    """Bug 16 and most others: the slope of the loss, computed row by row from its definition."""
    model, v, data = off_policy(torch.float64)
    got, result = gradient(model, v, data, kl=kl)
    assert got.abs().min() > 1e-6 and result["sums"][2] > 0  # and some tokens are clipped

    def logp(value, prompt, response):
        v.data = value
        logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1] / 0.8
        return logits.log_softmax(-1)[torch.arange(len(response)), response]

    def loss(value):
        total = 0.0
        for i, prompt in enumerate(data.prompts):
            response = data.ids[i][data.mask[i]].tolist()
            now = logp(value, prompt, response)
            base = logp(torch.zeros_like(value), prompt, response)
            ratio = (now - data.logp[i, :len(response)]).exp()
            A = data.advantage[i]
            total = total - torch.minimum(ratio * A, ratio.clamp(0.8, 1.4) * A).sum()
            total = total + kl * ((base - now).exp() - (base - now) - 1).sum()
        return total / data.mask.sum()

    start = v.detach().clone()
    slopes = []
    with torch.no_grad():
        for h in 1e-5 * torch.eye(5, dtype=torch.float64)[:, :, None]:
            slopes.append((loss(start + h) - loss(start - h)).item() / 2e-5)
    assert got.flatten().tolist() == pytest.approx(slopes, rel=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_gradient_does_not_depend_on_the_micro_batch(dtype, tolerance):
    """Bug 8: one row at a time, a few or all at once, with recomputation and without."""
    model, v, data = off_policy(dtype)
    want, result = gradient(model, v, data)
    assert want.abs().max() > 1e-3
    for tokens, recompute in ((1, False), (40, False), (100, True)):
        got, other = gradient(model, v, data, tokens_per_micro_batch=tokens, recompute=recompute)
        assert (got - want).norm() <= tolerance * want.norm()
        assert other["sums"] == pytest.approx(result["sums"], rel=1e-4)


def test_misuse_is_answered():
    """Sampling that silently was greedy; an update from the wrong rows; two rows decoded as one."""
    model, v, data = off_policy(torch.float32)
    with pytest.raises(ValueError, match="temperature 1.0 needs noise"):
        grpo.generate(model, PROMPTS, 4, 12, (0,), 1.0)
    with pytest.raises(ValueError, match="repeat each prompt"):
        grpo.Rollout(PROMPTS, data.ids, data.mask, data.logp, 1.0)
    with pytest.raises(TypeError, match="lr"):
        grpo.update(model, torch.optim.AdamW([v]), data, ARGS, grpo, lr=0.1)
    with pytest.raises(ValueError, match="decode takes one row"):
        Chat(TOY).decode(data.ids, data.mask)


ANSWERS = {  # text: (strict answer, lenient answer)
    "#### 18": ("18", "18"), "#### 18.": ("18", "18"), "#### 0018.00": ("18", "18"),
    "#### $1,800": ("1800", "1800"), "#### -7": ("-7", "-7"), "#### 18 eggs": ("18", "18"),
    "#### 5\nno\n#### 6": ("6", "6"), "#### -0": ("0", "0"), "#### -$.50": ("-0.5", "-0.5"),
    "#### \u22125": ("-5", "-5"), "#### 1\u2009800": ("1800", "1800"), "#### 18%": ("18", "18"),
    "The answer is 18.": (None, "18"), "so 10-3": (None, "3"), "(-3)": (None, "-3"),
    "": (None, None), "####": (None, None), "\\$12": (None, "12"), "#### x then 7": (None, "7"),
    "3 then #### 4 then 9": ("4", "4"), "#### 1,2,3": (None, "3"), "#### 5/2": (None, "2"),
    "#### 7" + " x" * 200: (None, "7"), "9" * 10000: (None, "9" * 10000)}


@pytest.mark.parametrize("text", ANSWERS, ids=lambda x: repr(x)[:20])
def test_answers(text):
    """Bug 23: which number a text gives as its answer."""
    assert (gsm8k.extract_answer(text), gsm8k.extract_answer(text, strict=False)) == ANSWERS[text]


def test_a_short_run(tmp_path, capsys):
    """train.py with --engine plain writes its files; the command that it prints evaluates the
    adapter to the run's own scores (bug 24: fixed problems, fixed noise)."""
    flags = "--params 13 --steps 2 --prompts 4 --max-new-tokens 24 --eval-count 8 --v-dtype bf16"
    plain = ["--engine", "plain", "--out"]
    assert train.main([*flags.split(), *plain, str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == summary["steps"] == 2
    assert summary["params"] == 13 and summary["adapter_bytes"] == 26
    command = capsys.readouterr().out.split("next: python train.py ")[1]
    assert train.main([*shlex.split(command), *plain, str(tmp_path / "b")]) == 0
    again = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert all(again[name] == summary["final_" + name] for name in ("strict", "format", "sampled"))
