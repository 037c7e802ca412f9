"""What fast/ does around the numbers: micro-batches, memory, the self-test; and the SVD."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import TOY, random_v, rollout, tiny, to_double

import fast
import grpo
import model as transformer
import tinylora
from fast import lanczos, sampling, training
from methods import lora
from support import threads
from support.errors import InputError


# ------------------------------------------------------------------------------- micro-batches

def batch():
    """A model and a rollout in fp64, sampled from another v, and args for update."""
    model = to_double_model()
    v = model.layers[0].self_attn.q_proj.v
    data = rollout(model, temperature=0.8, engine=fast)
    reward = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]])
    data.advantage = grpo.advantages(reward).flatten().double()
    v.data = random_v(v, 0.05).detach().float().double()  # update rounds to v_dtype, here fp32
    args = SimpleNamespace(clip_low=0.2, clip_high=0.4, kl=0.0, grad_clip=1e30, v_dtype="fp32",
                           tokens_per_micro_batch=2000, recompute=False)
    return model, v, data, args


def to_double_model():
    model = tiny(dtype=torch.float64)
    tinylora.adapt(model, 5)
    return to_double(model)


def gradient(model, v, data, args):
    grpo.update(model, torch.optim.AdamW([v], lr=0.0, weight_decay=0.0), data, args, fast)
    return v.grad.clone()


def test_micro_batches_cover_every_row_once():
    """Within the budget, prompts counted once, groups together; what is too long goes alone."""
    lengths = torch.tensor([5, 9, 2, 7, 7, 1, 30])
    prompts = [[1, 2, 3], [1, 2, 3], [4], [4], [1, 2, 3], [5, 6], [5, 6]]
    mask = torch.arange(30) < lengths[:, None]
    data = grpo.Rollout(prompts, mask.long(), mask, mask.float(), 1.0)
    for tokens in (1, 10, 18, 1000):
        batches = list(training.micro_batches(data, range(7), tokens))
        assert sorted(i for b in batches for i in b) == list(range(7))
        for b in batches:
            total = sum(map(len, {tuple(prompts[i]) for i in b})) + int(lengths[b].sum())
            assert len(b) == 1 or total <= tokens
    batches = training.micro_batches(data, range(7), 34)
    assert [sorted(b) for b in batches] == [[5, 6], [0, 1, 2, 3, 4]]


def test_gradient_does_not_depend_on_micro_batches_or_workers():
    model, v, data, args = batch()
    whole = gradient(model, v, data, args)
    assert whole.abs().max() > 1e-3
    for tokens, args.recompute in ((1, False), (40, True), (40, False), (100, True)):
        args.tokens_per_micro_batch = tokens
        results = []
        for workers in (1, 2, 5):
            threads.workers = workers
            results.append(gradient(model, v, data, args))
            assert (results[-1] - whole).norm() <= 1e-12 * whole.norm()
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(monkeypatch):
    """A single row that does not fit is an error; what fitted is where the next update begins."""
    model, v, data, args = batch()
    want = gradient(model, v, data, args)
    real = fast.logprobs
    calls = []

    def short(model, part, recompute=False):
        calls.append(len(part.prompts))
        if len(part.prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, part, recompute)
    monkeypatch.setattr(fast, "logprobs", short)
    limit = 3
    got = gradient(model, v, data, args)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    assert max(calls) > 3 and training.fitting < 100
    calls.clear()
    torch.testing.assert_close(gradient(model, v, data, args), want, rtol=1e-10, atol=0)
    assert max(calls) <= 3
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        gradient(model, v, data, args)


def test_out_of_memory_halves_the_rows_of_a_rollout_and_changes_nothing(monkeypatch):
    """One prompt that does not fit is an error; what fitted is where the next rollout begins."""
    model = tiny(dtype=torch.float64)
    prompts = [[i + 1, i + 2][:1 + i % 2] for i in range(7)]
    want = rollout(model, prompts, group=3)
    real = sampling.prefill
    calls = []

    def short(model, prompts, project):
        calls.append(len(prompts))
        if len(prompts) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, prompts, project)
    monkeypatch.setattr(sampling, "prefill", short)
    limit = 2
    for tried in ([7, 3, 1] + [1] * 6, [1] * 7):
        calls.clear()
        got = rollout(model, prompts, group=3, engine=fast)
        assert torch.equal(got.ids, want.ids) and torch.equal(got.mask, want.mask)
        assert got.prompts == want.prompts and calls == tried
        torch.testing.assert_close(got.logp, want.logp, rtol=1e-10, atol=1e-10)
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        rollout(model, prompts, group=3, engine=fast)


# -------------------------------------------------------------------------------------- check

PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_self_test_passes_and_leaves_everything_as_it_was(dtype):
    for adapt in (None, tinylora.adapt, lora.adapt):
        model = transformer.load(TOY, dtype)
        if adapt:
            adapt(model)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        attributes = {name: set(vars(m)) for name, m in model.named_modules()}
        fast.check(model, PROMPTS, [3])
        after = model.state_dict()
        assert all(torch.equal(x, after[name]) for name, x in before.items())
        assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
        assert all(p.grad is None for p in model.parameters())


def changed_rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


CHANGES = {
    "rope": (transformer, "rotate", changed_rotate),
    "the formula": (tinylora.TinyLoRALinear, "R", lambda self: 2 * REAL_R(self)),
    "the layer": (tinylora.TinyLoRALinear, "forward", lambda self, x: self.base(x)),
    "the MLP": (transformer.MLP, "forward", lambda self, x: self.down_proj(self.up_proj(x))),
    "greedy text": (grpo, "generate", lambda *args: REAL_GENERATE(*args[:5], 0)),
    "log-probs": (grpo, "logprobs", lambda *args: REAL_LOGPROBS(*args) - 0.01),
}
REAL_R = tinylora.TinyLoRALinear.R
REAL_FORWARD = tinylora.TinyLoRALinear.forward
REAL_GENERATE = grpo.generate
REAL_LOGPROBS = grpo.logprobs


@pytest.mark.parametrize("name", CHANGES)
def test_whoever_changes_the_plain_files_is_told(name, monkeypatch):
    model = transformer.load(TOY)
    tinylora.adapt(model)
    where, attribute, change = CHANGES[name]
    monkeypatch.setattr(where, attribute, change)
    if name == "the formula":  # both engines call R: this one is no difference
        fast.check(model, PROMPTS, [3])
        return
    with pytest.raises(InputError, match="--engine plain"):
        fast.check(model, PROMPTS, [3])


def other_S(module, x):
    """sqrt(S) on either side of R, as PEFT has it."""
    root = module.US.float().norm(dim=0).sqrt()  # (r,)
    h = torch.nn.functional.linear(x, module.Vt).float() * root
    return module.base(x) + ((h @ module.R().T) @ (module.US.float() / root).T).to(x.dtype)


@pytest.mark.parametrize("change", [
    other_S,
    lambda self, x: REAL_FORWARD(self, x) * 2 - self.base(x),  # twice the change
    lambda self, x: self.base(x) + torch.nn.functional.linear(x, self.Vt) @ self.US.T])  # no R
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_changed_layer_is_told_in_every_dtype(dtype, change, monkeypatch):
    """In bf16 it was not: log-probs may differ by 0.2 there, and v was 0.01."""
    model = transformer.load(TOY, dtype)
    tinylora.adapt(model)
    fast.check(model, PROMPTS, [3])
    monkeypatch.setattr(tinylora.TinyLoRALinear, "forward", change)
    with pytest.raises(InputError, match="--engine plain"):
        fast.check(model, PROMPTS, [3])


def test_other_modules_are_refused():
    class Gated(transformer.MLP):
        pass
    model = tiny()
    model.layers[1].mlp.__class__ = Gated
    with pytest.raises(InputError, match="Gated.*--engine plain"):
        fast.check(model, PROMPTS, [3])


# ---------------------------------------------------------------------------------------- SVD

SHAPES = [(64, 64), (127, 400), (300, 8), (2, 2), (128, 200), (600, 500), (5000, 300), (200, 7000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_truncated_svd_equals_full_svd(shape):
    """Values to 1e-5, vectors, the stated residual; also for nearly equal values.

    Up to 127 on the short side a full SVD is taken; the next two restart with few columns, the last
    two are multiplied in parts.
    """
    for seed, decay in ((0, 0.0), (1, 0.5), (2, 5.0)):
        W = torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()
        W = W * torch.exp(-decay * torch.arange(shape[1]) / 10)
        U, S, V, residual = lanczos.truncated_svd(W, 2)
        plain_U, plain_S, plain_V, _ = tinylora.truncated_svd(W.double(), 2)
        torch.testing.assert_close(S, plain_S, rtol=1e-5, atol=0)
        assert (U.T @ plain_U).diag().min() > 0.9999 and (V.T @ plain_V).diag().min() > 0.9999
        true = max((W.T @ U - V * S).norm(dim=0).max(), (W @ V - U * S).norm(dim=0).max()) / S[0]
        assert true <= 1.2 * residual + 3e-6 and residual <= 1e-5
        # a full SVD, which reports 0, would hide a loop that does not converge
        assert (residual > 0) == (min(shape) >= 128)
        assert (U.double().sum(0) > 0).all() and torch.allclose(U.T @ U, torch.eye(2), atol=1e-5)


def test_truncated_svd_of_few_directions_and_of_too_fine_a_wish():
    """W of low rank: the basis soon holds all of it, and must stay orthonormal. Nothing converges
    to 1e-12 in fp32: then it is a full SVD."""
    for rank in (2, 5, 17, 30):
        rng = np.random.RandomState(rank)
        W = rng.standard_normal((1200, rank)) @ rng.standard_normal((rank, 1200))
        W = torch.from_numpy(W).float()
        _, S, _, residual = lanczos.truncated_svd(W, 2)
        assert 0 < residual < 3e-6
        torch.testing.assert_close(S, torch.linalg.svdvals(W)[:2], rtol=3e-6, atol=0)
    W = W[:300, :200]
    _, S, _, residual = lanczos.truncated_svd(W, 2, tol=1e-12)
    assert residual == 0
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[:2])
    for W in (torch.zeros(300, 200), torch.ones(300, 200)):
        assert all(torch.as_tensor(x).isfinite().all() for x in lanczos.truncated_svd(W, 2))


def test_truncated_svd_signs_and_failures():
    """The signs follow the rule whichever way the solver goes; NaN is not a result."""
    for shape in ((300, 200), (50, 30)):
        W = torch.from_numpy(np.random.RandomState(0).standard_normal(shape)).float()
        U, S, V, _ = lanczos.truncated_svd(W, 2)
        U2, S2, V2, _ = lanczos.truncated_svd(W.flip(1), 2)  # the same U, another path to it
        torch.testing.assert_close(U, U2, atol=1e-4, rtol=0)
        torch.testing.assert_close(V, V2.flip(0), atol=1e-4, rtol=0)
    model = tiny()
    model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(InputError, match="layer 1, mlp.up_proj: .*NaN"):
        tinylora.adapt(model, 13, svd=fast.svd)


def test_the_svds_do_not_depend_on_the_number_of_threads():
    """Matrices so large that one product would be shared out among threads; afterwards, and after
    an error, torch has as many as before."""
    kept = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        factors = []
        large = tiny(heads=8, kv=8, head_dim=64, hidden=512, mid=1500, layers=1)
        for model in (transformer.load(TOY), large):
            tinylora.adapt(model, 13, svd=fast.svd)
            assert torch.get_num_threads() == count
            factors += [t for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)
                        for t in (m.US, m.Vt)]
        kept.append(factors)
        model = tiny()
        model.layers[0].self_attn.k_proj.weight[0, 0] = math.inf
        with pytest.raises(InputError, match="layer 0, self_attn.k_proj"):
            tinylora.adapt(model, 13, svd=fast.svd)
        assert torch.get_num_threads() == count
    for other in kept[1:]:
        assert all(torch.equal(a, b) for a, b in zip(kept[0], other, strict=True))
