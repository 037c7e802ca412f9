"""grpo.py beyond the spec's tests: rows and their batch, statistics, mini-batches, dtypes."""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import random_v, rollout, tiny, to_double

import fast
import grpo
import tinylora
from support.errors import InputError

ARGS = SimpleNamespace(clip_low=0.2, clip_high=0.4, kl=0.0, grad_clip=1e30, v_dtype="fp32",
                       tokens_per_micro_batch=10**9, recompute=False)
REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])  # one group without signal


def off_policy(dtype=torch.float64):
    """(model, v, rollout): v has changed since the sampling, so ratios are not 1."""
    model = tiny(dtype=dtype)
    v = tinylora.adapt(model, 5)
    if dtype == torch.float64:
        to_double(model)
    data = rollout(model, temperature=0.8)
    data.advantage = grpo.advantages(REWARDS).flatten().to(dtype)
    data.ref_logp = data.logp - 0.1 * data.mask
    v.data = random_v(v, 0.05).detach().float().to(dtype)  # update rounds to v_dtype, here fp32
    return model, v, data


def adam(v, lr=0.0):
    return torch.optim.AdamW([v], lr=lr, weight_decay=0.0)


def update(model, v, data, lr=0.0, **changes):
    return grpo.update(model, adam(v, lr), data, SimpleNamespace(**vars(ARGS) | changes), grpo)


# ------------------------------------------------------------------------------------- sampling

def test_a_row_does_not_depend_on_its_batch():
    """Bugs 5, 19: the same noise gives the same text, alone or in a batch; the rows of a group
    have their own first tokens."""
    model = tiny()
    data = rollout(model, length=24)
    noise = np.random.RandomState(0).random_sample((12, 24))
    for i in range(12):
        alone = grpo.generate(model, [data.prompts[i]], 1, 24, (0, 3), 1.0, noise[i:i + 1])
        n = int(alone.mask.sum())
        assert n == int(data.mask[i].sum()) and torch.equal(alone.ids[0, :n], data.ids[i, :n])
        want = data.logp[i, :n]
        torch.testing.assert_close(alone.logp[0, :n], want, atol=1e-5, rtol=1e-5)
    assert len(set(data.ids[:4, 0].tolist())) > 1, "the group shares its first token (bug 5)"


def test_how_often_the_host_looks_changes_nothing(monkeypatch):
    """Sampling ends at the first look that finds all rows ended; the rest is padding."""
    model = tiny(vocab=8)
    want = rollout(model, prompts=[[1, 2, 4]], length=60)
    assert want.ids.shape[1] < 60
    for every in (1, 3, 100):
        monkeypatch.setattr(grpo, "CHECK_EVERY", every)
        got = rollout(model, prompts=[[1, 2, 4]], length=60)
        n = int(want.mask.sum(1).max())
        assert torch.equal(got.ids[:, :n], want.ids[:, :n]) and not got.mask[:, n:].any()


def test_greedy_is_argmax():
    """Temperature 0 takes the most likely token; its log-prob is that at temperature 1."""
    model = tiny()
    data = grpo.generate(model, [[5, 6, 7]], 1, 6, (49,), 0.0)
    text = [5, 6, 7]
    for t in range(int(data.mask.sum())):
        logp = model(torch.tensor([text]))[0, -1].log_softmax(-1)
        text.append(int(logp.argmax()))
        assert data.logp[0, t].item() == pytest.approx(logp.max().item(), abs=1e-5)
    assert text[3:] == data.ids[0][data.mask[0]].tolist()


def test_progress_is_told_at_every_look():
    """The bar stood still, or counted rows that had ended as going on."""
    told = []
    data = rollout(tiny(), length=40, group=30, progress=lambda *numbers: told.append(numbers))
    stopped = (torch.isin(data.ids, torch.tensor([0, 3])) & data.mask).any(1)
    lengths = data.mask.sum(1)
    for tokens, ended in told:
        assert ended == int((stopped & (lengths <= tokens)).sum())
    assert [tokens for tokens, _ in told] == list(range(4, 40, 4))
    assert len({ended for _, ended in told}) > 4


def test_numbers_that_are_not_finite_are_an_error():
    """NaN logits must not pass for text, neither in sampling nor in an update."""
    model, v, data = off_policy(torch.float32)
    with torch.no_grad():
        v.fill_(1e30)
    with pytest.raises(InputError, match="not finite"):
        rollout(model)
    with pytest.raises(InputError, match="not finite"):
        update(model, v, data, lr=0.1)


@pytest.mark.parametrize("engine", [grpo, fast])
@pytest.mark.parametrize("noise", [None, *map(np.zeros, ((3, 12), (24, 12), (12, 11)))])
def test_noise_of_another_shape_is_refused(noise, engine):
    """Noise for each prompt in place of each row, or for other rows; too little of it."""
    with pytest.raises(ValueError, match="needs noise of shape .12, 12."):
        engine.generate(tiny(), [[1], [2], [3]], 4, 12, (0,), 1.0, noise)


# -------------------------------------------------------------------------------------- Rollout

def test_rows_split_and_join():
    """Prompts, masks, advantages and log-probs of the same rows stay together, padding is cut."""
    model, v, data = off_policy()
    parts = data.split(3)
    assert [len(part.prompts) for part in parts] == [4, 4, 4]
    for k, part in enumerate(parts):
        width = part.ids.shape[1]
        rows = slice(4 * k, 4 * k + 4)
        assert width == int(part.mask.sum(1).max()) and part.prompts == data.prompts[rows]
        assert torch.equal(part.advantage, data.advantage[rows])
        for name in ("ids", "mask", "logp", "ref_logp"):
            assert torch.equal(getattr(part, name), getattr(data, name)[rows, :width])
    again = grpo.Rollout.join(parts)
    assert again.prompts == data.prompts and again.temperature == data.temperature
    n = again.ids.shape[1]
    for name in ("ids", "mask", "logp"):
        assert torch.equal(getattr(again, name), getattr(data, name)[:, :n])


# --------------------------------------------------------------------------------------- update

def test_an_update_does_not_change_the_rollout():
    """Bug 9: masks or log-probs changed in place by the first update spoil the second."""
    model, v, data = off_policy()
    before = copy.deepcopy(data)
    update(model, v, data, lr=0.1, kl=0.1, tokens_per_micro_batch=40)
    assert before.prompts == data.prompts
    for name in ("ids", "mask", "logp", "advantage", "ref_logp"):
        assert torch.equal(getattr(before, name), getattr(data, name))


def test_groups_without_signal_cost_no_forward_and_change_nothing(monkeypatch):
    """Bug 11: their rows never reach the model, yet their tokens count in the denominator. If no
    group has a signal the gradient is 0."""
    model, v, data = off_policy()
    logprobs = grpo.logprobs
    seen = []
    monkeypatch.setattr(grpo, "logprobs", lambda model, batch, *rest: (
        seen.extend(batch.prompts) or logprobs(model, batch, *rest)))
    update(model, v, data)
    got = v.grad.clone()
    assert len(seen) == 8
    loss = grpo.grpo_loss(logprobs(model, data), data, int(data.mask.sum()), ARGS)
    want, = torch.autograd.grad(loss, v)  # of all rows
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    seen.clear()
    data.advantage = torch.zeros_like(data.advantage)
    result = update(model, v, data)
    assert not seen and (v.grad == 0).all() and result["sums"] == [0, 0, 0, 0]
    update(model, v, data, kl=0.1)  # the KL's gradient needs all rows
    assert len(seen) == 12


def test_statistics_ignore_padding():
    """Bug 12: the same numbers with twenty more columns of padding, and none for equal policies."""
    model, v, data = off_policy()
    wide = copy.deepcopy(data)
    for name in ("ids", "mask", "logp", "ref_logp"):
        setattr(wide, name, F.pad(getattr(data, name), (0, 20)))
    a = update(model, v, data, kl=0.1)
    b = update(model, v, wide, kl=0.1)
    assert a["sums"] == pytest.approx(b["sums"], rel=1e-9)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    tokens, distance, clipped, k3 = a["sums"]
    assert tokens == data.mask.sum() and 0 < clipped < tokens and k3 > 0
    assert distance / tokens > 1e-3  # the `gap` must show that the sampler had another v
    with torch.no_grad():
        v.zero_()
    assert update(model, v, data)["sums"][1] / tokens < 1e-9


def test_clipped_tokens_are_counted_on_the_side_that_clips():
    """A ratio above 1.4 is clipped only where A > 0, one below 0.8 only where A < 0."""
    zeros = torch.zeros(2, 3)
    logp = torch.tensor([[2.0, 1.3, 0.5], [0.5, 0.9, 2.0]]).log()
    mask = torch.ones(2, 3, dtype=torch.bool)
    data = grpo.Rollout([[1], [1]], zeros.long(), mask, zeros, 1.0, torch.tensor([1.0, -2.0]))
    assert grpo.statistics(logp, data, ARGS)[2] == 2


def test_the_gradient_is_clipped_to_its_norm():
    """v's step would be the same under Adam: look at the gradient itself."""
    model, v, data = off_policy()
    norm = update(model, v, data)["grad_norm"]
    assert norm == pytest.approx(v.grad.norm().item(), rel=1e-9)
    assert update(model, v, data, grad_clip=norm / 2)["grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert v.grad.norm().item() == pytest.approx(norm / 2, rel=1e-4)


def test_minibatches_are_separate_updates():
    """Each has its own denominator and learning rate, and moves v before the next one."""
    model, v, data = off_policy()
    start = v.detach().clone()
    first, second = data.rows([0, 1, 2, 3, 8, 9, 10, 11]).split(2)
    optimizer = adam(v)
    for lr, batch in ((0.01, first), (0.02, second)):
        optimizer.param_groups[0]["lr"] = lr
        before = v.detach().clone()
        result = grpo.update(model, optimizer, batch, ARGS, grpo)
        assert result["sums"][0] == batch.mask.sum()
        if batch is first:  # Adam's first step is lr in size
            moved = (v - before).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-3, atol=0)
    two = v.detach().clone()
    with torch.no_grad():
        v.copy_(start)
    update(model, v, data.rows([0, 1, 2, 3, 8, 9, 10, 11]), lr=0.02)
    assert not torch.allclose(two, v, atol=1e-3)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_v_dtype_rounds_the_kept_value_only(name):
    """Bug 14: on a bf16 model too, v and Adam's state are fp32; with --v-dtype, the value of v
    after an update is one that the type can hold."""
    model = tiny(dtype=torch.bfloat16)
    v = tinylora.adapt(model, 5)
    data = rollout(model)
    data.advantage = grpo.advantages(REWARDS).flatten()
    optimizer = adam(v, 0.0123)
    args = SimpleNamespace(**vars(ARGS) | {"v_dtype": name})
    for _ in range(3):
        grpo.update(model, optimizer, data, args, grpo)
    dtype = tinylora.DTYPES[name]
    assert v.dtype == torch.float32 and v.abs().min() > 0
    assert torch.equal(v, v.to(dtype).float())
    assert (name == "fp32") or not torch.equal(v * 1.001, (v * 1.001).to(dtype).float())
    assert all(x.dtype == torch.float32 for x in optimizer.state[v].values())
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}


def test_training_leaves_the_base_alone():
    """Bug 15: nothing is merged, so setting v back to 0 gives the base model bit for bit."""
    base = tiny()
    model = tiny()
    v = tinylora.adapt(model, 13)
    data = rollout(model)
    data.advantage = grpo.advantages(REWARDS).flatten()
    update(model, v, data, lr=0.5)
    ids = torch.arange(20)[None]
    assert not torch.allclose(base(ids), model(ids), atol=1e-3)
    with torch.no_grad():
        v.zero_()
    assert torch.equal(base(ids), model(ids))


@pytest.mark.parametrize("tokens", [1, 10, 18, 1000])
def test_micro_batches_cover_every_row_once(tokens):
    """At most that many tokens each, padding counted; a row that is longer goes alone."""
    lengths = torch.tensor([5, 9, 2, 7, 7, 1, 30])
    mask = torch.arange(30) < lengths[:, None]
    prompts = [[1, 2, 3], [1, 2, 3], [4], [4], [1, 2, 3], [5, 6], [5, 6]]
    data = grpo.Rollout(prompts, torch.arange(7)[:, None] * mask, mask, mask * 0.0, 1.0)
    seen = []

    def share(batch):
        sizes = [len(p) + n for p, n in zip(batch.prompts, batch.mask.sum(1).tolist())]
        assert len(sizes) == 1 or max(sizes) * len(sizes) <= tokens
        seen.extend(batch.ids[:, 0].tolist())
        return [torch.tensor(float(len(sizes)))]
    rows = [0, 1, 2, 4, 5, 6]
    assert grpo.accumulate(share, data, rows, tokens)[0] == 6
    assert sorted(seen) == rows
    assert grpo.accumulate(share, data, [], tokens) is None
