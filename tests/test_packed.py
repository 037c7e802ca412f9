"""fast/packed.py: layers whose weights are laid out once per rollout are the layers."""
import numpy as np
import pytest
import torch

from helpers import arrives, random_v, rollout, tiny

import fast
import grpo
import tinylora
from fast import packed
from fast.forward import BF16, Held
from methods import lora

LARGE = dict(hidden=512, mid=600, heads=8, kv=4, head_dim=64, layers=2, vocab=600)

pytestmark = pytest.mark.skipif(not packed.ONEDNN, reason="no oneDNN in this torch")


def adapted(dtype=torch.float32, scale=0.05, **kw):
    """A model with large layers, a v that matters, and v. Small weights: logits near 1."""
    model = tiny(dtype=dtype, **LARGE | kw)
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 0.1
    v = random_v(tinylora.adapt(model, u=3, n_tie=3, rank=3), scale)
    return model, v


def stacks(model):
    """{how many layers: how many stacks} of a rollout."""
    sizes = [len(stack.sizes) for stack in packed.hold(model).stacks.values()]
    return {n: sizes.count(n) for n in sorted(set(sizes))}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_rollout_of_stacks_is_the_plain_rollout(kind, tied):
    """With biases and without, few rows and more, rows that leave; also after a step of v."""
    model, v = adapted(kind=kind, tied=tied)
    assert stacks(model) == {1: 4, 2: 2, 3: 2} and packed.hold(model).head is not None
    model.vocab = 590
    for seed, group in enumerate((1, 8)):
        quick = rollout(model, group=group, seed=seed, engine=fast, stops=range(100))
        plain = rollout(model, group=group, seed=seed, engine=grpo, stops=range(100))
        assert torch.equal(quick.ids, plain.ids)
        torch.testing.assert_close(quick.logp, plain.logp, atol=1e-4, rtol=0)
        with torch.no_grad():
            v += 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype,tolerance", [
    (torch.float32, 1e-6),
    pytest.param(torch.bfloat16, 8e-3, marks=pytest.mark.skipif(not BF16, reason="no bf16"))])
def test_every_stack_is_its_layers(dtype, tolerance):
    """Each layer's result is its own, at any number of rows, as near to the exact one as it was."""
    model, _ = adapted(dtype, scale=1.0)
    held = packed.hold(model)
    assert len(held.stacks) == 8
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        for modules in ((attention.q_proj, attention.k_proj, attention.v_proj),
                        (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
            for rows in (1, 2, 32, 33, 300):
                x = np.random.RandomState(rows).standard_normal((rows, modules[0].Vt.shape[1]))
                x = torch.from_numpy(x).to(dtype)
                for module, y in zip(modules, held.project(modules, x), strict=True):
                    exact = torch.nn.functional.linear(
                        x.double(), module.base.weight.double(),
                        None if module.base.bias is None else module.base.bias.double())
                    exact += (x.double() @ module.Vt.T.double() @ module.R().T.double()
                              @ module.US.T.double())
                    assert y.shape == exact.shape and y.dtype == dtype
                    assert (y - exact).norm() < tolerance * exact.norm()


@torch.no_grad()
@pytest.mark.skipif(not BF16, reason="no bf16")
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_small_change_is_not_rounded_away_in_bf16(kind):
    """Bug 25, as in tests/test_fast.py; here beside a bias, too."""
    model, v = adapted(torch.bfloat16, scale=0.0, kind=kind)
    modules = [model.layers[0].self_attn.get_submodule(name + "_proj") for name in "qkv"]
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((500, 512))).bfloat16()
    before = packed.hold(model).project(modules, x)
    random_v(v, 0.003)
    for module, y, base in zip(modules, packed.hold(model).project(modules, x), before):
        change = x.double() @ module.Vt.T.double() @ module.R().T.double() @ module.US.T.double()
        assert change.norm() < 1e-3 * base.double().norm()
        assert 0.9 < arrives(y, base, change) < 1.1


def test_where_there_is_nothing_to_gain_nothing_is_laid_out(monkeypatch):
    """Small weights, fp64, LoRA's layers, a model too large for a second copy."""
    small = tiny()
    tinylora.adapt(small, 13)
    held = packed.hold(small)
    assert not held.stacks and held.head is None
    assert type(packed.hold(adapted(torch.float64)[0])) is Held

    model = tiny(**LARGE)
    lora.adapt(model, rank=2)
    assert not packed.hold(model).stacks and packed.hold(model).head is not None

    model, _ = adapted()
    monkeypatch.setattr(packed, "MOST", 4 * sum(p.numel() for p in model.parameters()) // 2)
    assert type(packed.hold(model)) is not packed.Packed


def test_weights_that_changed_are_laid_out_anew():
    """Nothing is kept from one rollout to the next."""
    model, _ = adapted()
    before = rollout(model, engine=fast)
    for block in model.layers:
        block.mlp.down_proj.base.weight.data.neg_()
    quick = rollout(model, engine=fast)
    plain = rollout(model, engine=grpo)
    assert torch.equal(quick.ids, plain.ids) and not torch.equal(before.ids, quick.ids)
