"""fast/ computes the numbers of model.py, tinylora.py and grpo.py. Both engines on one model."""
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import (LLAMA3, MODELS, TOY, arrives, check_logprobs, random_v, rollout, tiny,
                     to_double)

import fast
import grpo
import model as transformer
import tinylora
from fast import forward, passes, training
from methods import lora
from support.chat_format import Chat
from support.errors import InputError

ARGS = SimpleNamespace(clip_low=0.2, clip_high=0.4, kl=0.0, grad_clip=1e9, v_dtype="fp32",
                       tokens_per_micro_batch=100, recompute=False)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10], [11], [12, 13, 14, 0, 15, 0, 16]]
ADVANTAGES = torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0], [-1, -1, 3, -1]]).flatten()


def adapted(method, **kw):
    """A model in fp64, with an adapter that is not zero, and its trained tensors."""
    model = tiny(dtype=torch.float64, **kw)
    if method == "tinylora":
        params = [tinylora.adapt(model, u=3, n_tie=4, rank=3)]
    elif method == "lora-xs":
        params = [tinylora.adapt(model, rank=2, method="lora-xs")]
    else:
        params = lora.adapt(model, rank=2)
    for seed, p in enumerate(params):
        random_v(p, 0.1, seed)
    return to_double(model), params


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_the_engines_are_interchangeable():
    """What update and train.py ask of an engine, with the same parameters."""
    for name in ("generate", "logprobs", "accumulate", "svd"):
        assert callable(getattr(fast, name)) and callable(getattr(grpo, name))


@pytest.mark.parametrize("method", ["tinylora", "lora-xs", "lora"])
@pytest.mark.parametrize("kw", MODELS + [dict(tied=False, kind="llama", scaling=LLAMA3)], ids=str)
def test_equal_on_every_model(kw, method):
    """The same ids, log-probs and gradients to 1e-10: ragged prompts, early stops, greedy and
    sampled, groups large and of one."""
    model, params = adapted(method, **kw)
    model.vocab = 47
    for seed, (group, temperature) in enumerate(((4, 1.0), (1, 0.7), (3, 0.0), (2, 2.0))):
        noise = np.random.RandomState(seed).random_sample((len(PROMPTS) * group, 20))
        args = PROMPTS, group, 20, (0, 3, 7), temperature, noise if temperature else None
        plain = grpo.generate(model, *args)
        quick = fast.generate(model, *args)
        assert torch.equal(plain.ids, quick.ids) and torch.equal(plain.mask, quick.mask)
        assert (group == 1 or temperature == 0 or not plain.mask.all()) and plain.ids.max() < 47
        assert plain.prompts == quick.prompts and plain.temperature == quick.temperature
        close(plain.logp, quick.logp)
        if temperature == 0:
            continue
        check_logprobs(model, params, plain, fast)


@pytest.mark.parametrize("tokens", [1, 40, 10**9])
def test_updates_are_equal(tokens):
    """One update from the same mini-batch: gradient, statistics and loss, however it is cut."""
    model, params = adapted("tinylora")
    data = rollout(model)
    data.advantage = ADVANTAGES.double()
    random_v(params[0], 0.12, 0)
    start = params[0].detach().clone()
    results = []
    for engine in (grpo, fast):
        with torch.no_grad():
            params[0].copy_(start)
        optimizer = torch.optim.AdamW(params, lr=0.01)
        args = SimpleNamespace(**vars(ARGS) | {"tokens_per_micro_batch": tokens})
        out = grpo.update(model, optimizer, data, args, engine)
        results.append((torch.tensor(out["sums"]), torch.tensor([out["loss"], out["grad_norm"]]),
                        params[0].grad))
    assert results[0][2].abs().max() > 1e-3
    for a, b in zip(*results):
        close(a, b, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_five_steps_on_the_toy_end_in_the_same_v(dtype):
    model = transformer.load(TOY, dtype)
    chat = Chat(TOY)
    model.vocab = chat.vocab
    prompts = [chat.prompt(f"{name} has {n} nuts. Then she finds {n + 2} more. How many now?")
               for name in ("Mia", "Eva", "Ada") for n in range(1, 4)]
    v = tinylora.adapt(model, 13, svd=fast.svd)
    if dtype == torch.float64:
        to_double(model)
    ended = []
    for engine in (grpo, fast):
        with torch.no_grad():
            v.zero_()
        optimizer = torch.optim.AdamW([v], lr=0.05)
        for step in range(5):
            noise = grpo.uniforms([[3, 0, step, i] for i in range(36)], 24)
            data = engine.generate(model, prompts, 4, 24, chat.stop_ids, 1.0, noise)
            reward = (data.ids * data.mask).sum(1) % 7 / 3  # any that differs within groups
            data.advantage = grpo.advantages(reward.view(-1, 4)).flatten().to(v.dtype)
            grpo.update(model, optimizer, data, ARGS, engine)
        ended.append(v.detach().clone())
    assert ended[0].abs().max() > 0.05
    # Adam divides by the gradient's size, so a gradient near 0 shows its rounding; and v_dtype
    # fp32 rounds v in fp64 models too
    close(*ended, 1e-5 if dtype == torch.float32 else 1e-7)


def test_a_row_does_not_depend_on_its_batch(monkeypatch):
    """Same noise, same text: alone, in a group, with ended rows dropped early or never."""
    model = tiny()
    first = rollout(model, length=24, engine=fast)
    noise = np.random.RandomState(0).random_sample((12, 24))
    for every in (1, 3, 100):
        monkeypatch.setattr(grpo, "CHECK_EVERY", every)
        other = rollout(model, length=24, engine=fast)
        n = min(first.ids.shape[1], other.ids.shape[1])
        assert torch.equal(first.ids[:, :n], other.ids[:, :n])
        assert first.mask[:, n:].sum() == other.mask[:, n:].sum() == 0
        close(first.logp[:, :n], other.logp[:, :n], 1e-5)
    for i in range(12):
        one = fast.generate(model, [first.prompts[i]], 1, 24, (0, 3), 1.0, noise[i:i + 1])
        k = int(one.mask.sum())
        assert k == int(first.mask[i].sum()) and torch.equal(one.ids[0, :k], first.ids[i, :k])
        close(one.logp[0, :k], first.logp[i, :k], 1e-5)


def test_a_v_for_every_prompt_equals_single_runs():
    """64 different v's in one batch, ragged prompts, rows dropped as they end: each row's text and
    log-probs are those of its own run, to 1e-5; v itself is untouched."""
    model = tiny()
    v = random_v(tinylora.adapt(model, 26, rank=3), 0.1)
    before = v.detach().clone()
    rng = np.random.RandomState(3)
    values = torch.from_numpy(rng.standard_normal((64, *v.shape))).float() * 0.5
    prompts = [list(np.random.RandomState(i).randint(0, 50, 3 + i % 7)) for i in range(64)]
    noise = np.random.RandomState(0).random_sample((128, 20))
    many = fast.generate(model, prompts, 2, 20, (0, 3), 1.0, noise, values=values)
    assert 0 < (~many.mask).sum() and torch.equal(v, before)
    for i in range(64):
        with torch.no_grad():
            v.copy_(values[i])
        rows = slice(2 * i, 2 * i + 2)
        one = fast.generate(model, [prompts[i]], 2, 20, (0, 3), 1.0, noise[rows])
        n = one.ids.shape[1]
        assert torch.equal(one.ids, many.ids[rows, :n])
        assert torch.equal(one.mask, many.mask[rows, :n])
        close(one.logp, many.logp[rows, :n], 1e-5)


def test_progress_is_told_at_every_look():
    told = []
    data = rollout(tiny(), length=40, group=30, engine=fast, progress=lambda *x: told.append(x))
    lengths = data.mask.sum(1)
    ended = (torch.isin(data.ids, torch.tensor([0, 3])) & data.mask).any(1)
    want = [(t, int((ended & (lengths <= t)).sum())) for t in range(4, 40, 4)]
    assert told == want[:len(told)] and len({done for _, done in told}) > 4
    assert len(told) == 9 or told[-1][1] == 90


def test_misuse_and_numbers_that_blow_up_are_errors():
    model = tiny()
    v = tinylora.adapt(model, 5)
    with pytest.raises(ValueError, match="noise"):
        fast.generate(model, [[1, 2]], 2, 4, (0,), 0.7)
    with torch.no_grad():
        v.fill_(1e30)
    with pytest.raises(InputError, match="not finite"):
        rollout(model, engine=fast)


@torch.no_grad()
def test_R_is_not_rounded_on_a_bf16_model():
    """A step of v that bf16 cannot see (1e-4 of 1) still moves the layer's output, in training and
    in sampling."""
    model = tiny(dtype=torch.bfloat16)
    v = tinylora.adapt(model, 1)
    layer = model.layers[0].mlp.up_proj
    layer.base.weight.zero_()  # only U S R V^T x is left to see
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((500, 32))).bfloat16()
    trained, sampled, cores = [], [], []
    for value in (1.0, 1.0001):
        v.fill_(value)
        trained.append(forward.project_one(layer, x))
        sampled.append(forward.Held(model).project_one(layer, x))
        cores.append(layer.R().bfloat16())
    assert torch.equal(*cores)
    for first, second in (trained, sampled):
        assert 0.001 < (first != second).float().mean() < 0.5


@torch.no_grad()
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_every_way_to_apply_a_layer_is_the_formula(dtype, tolerance):
    """In bf16 as near to it as the plain layer; v's next value is seen after refresh."""
    model = tiny(dtype=dtype)
    v = tinylora.adapt(model, u=3, n_tie=5, seed=7)
    held = forward.Held(model)
    for seed in (0, 1):
        random_v(v, seed=seed)
        held.refresh()
        many = forward.HeldMany(model, torch.stack((torch.zeros_like(v), v)))
        many.which = torch.ones(500, dtype=torch.long)
        for module in held.RSUt:
            module.base.weight.zero_()  # only U S R V^T x is left to see
            module.base.bias = None
            x = np.random.RandomState(0).standard_normal((500, module.Vt.shape[1]))
            x = torch.from_numpy(x).to(dtype)
            exact = x.double() @ module.Vt.T.double() @ module.R().T.double() @ module.US.T.double()
            ways = [forward.project_one(module, x), held.project_one(module, x),
                    many.project_one(module, x)]
            for y in (*ways, module(x)):
                assert (y - exact).norm() < tolerance * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("name,way", [
    *[("mlp.up_proj", way) for way in ("plain", "training", "sampling", "many", "lora")],
    *[pytest.param("self_attn.q_proj", way,
                   marks=pytest.mark.skipif(not forward.BF16, reason="no bf16"))
      for way in ("training", "sampling", "many")]])
def test_a_small_change_is_not_rounded_away_in_bf16(name, way):
    """Bug 25. Far below the last place of W x, it arrives at its size on average: the sum is
    rounded once. q_proj has a bias."""
    model = tiny(dtype=torch.bfloat16)
    trained = lora.adapt(model, rank=2) if way == "lora" else [tinylora.adapt(model, 1)]
    layer = model.layers[0].get_submodule(name)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((5000, 32))).bfloat16()
    before = layer(x)
    assert torch.equal(before, layer.base(x))
    if way == "lora":
        random_v(layer.B, 1e-4)
        change = x.double() @ layer.A.T.double() @ layer.B.T.double() * layer.scale
    else:
        trained[0].fill_(0.001)
        change = x.double() @ layer.Vt.T.double() @ layer.R().T.double() @ layer.US.T.double()
    assert change.norm() < 1e-3 * before.double().norm()
    many = forward.HeldMany(model, trained[0][None]) if way == "many" else None
    if many:
        many.which = torch.zeros(5000, dtype=torch.long)
    apply = {"plain": lambda layer, x: layer(x), "lora": lambda layer, x: layer(x),
             "training": forward.project_one, "sampling": forward.Held(model).project_one,
             "many": many and many.project_one}[way]
    assert 0.9 < arrives(apply(layer, x), before, change) < 1.1


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj"])  # with a bias, and without
def test_a_layer_and_its_gradients_in_bf16_are_near_the_exact_ones(name):
    """Of what training uses: y, x's gradient, through W and through V, and v's."""
    ways = []
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny(dtype=torch.bfloat16)
        v = random_v(tinylora.adapt(model, u=3, n_tie=5), 1.0)
        model = to_double(model) if dtype == torch.float64 else model
        layer = model.layers[0].get_submodule(name)
        for tensor in ("Vt", "US"):
            setattr(layer, tensor, getattr(layer, tensor).to(dtype))
        x = torch.from_numpy(np.random.RandomState(0).standard_normal((300, 32))).bfloat16()
        x = x.to(dtype).requires_grad_()
        y = forward.project_one(layer, x)
        ways.append([y, *torch.autograd.grad(y.double().square().sum(), [x, v])])
    for near, exact in zip(*ways):
        assert (near - exact).norm() < 0.01 * exact.norm()


def test_linear_is_the_product_for_any_sizes():
    """Few rows and many, weights large and small, inputs transposed or not, bias or none; so is its
    gradient, also of weights that are trained."""
    rng = np.random.RandomState(0)
    for d_out in (700, 90):
        W = torch.from_numpy(rng.standard_normal((d_out, 400))).float()
        bias = torch.from_numpy(rng.standard_normal(d_out)).float()
        for rows in (1, 2, 11, 64, 65, 257):
            x = torch.from_numpy(rng.standard_normal((rows, 400))).float()
            for laid in (x, x.T.contiguous().T):
                assert forward.linear(laid, W).is_contiguous()
                close(forward.linear(laid, W), x @ W.T, 1e-4)
                close(forward.linear(laid, W, bias), x @ W.T + bias, 1e-4)
                for weight in (W, W.clone().requires_grad_()):
                    leaf = laid.clone().requires_grad_()
                    dy = forward.linear(leaf, weight, bias).detach().cos()
                    forward.linear(leaf, weight, bias).backward(dy)
                    close(leaf.grad, dy @ W, 1e-4)
                    if weight.requires_grad:
                        close(weight.grad, dy.T @ x, 1e-4)


def test_training_keeps_no_more_than_it_must():
    """No linear's input is kept, as only a weight's gradient would need it, and the mask is kept
    once, not once a layer."""
    model = tiny(layers=3)
    tinylora.adapt(model, 13)
    data = rollout(model)
    kept = []
    inputs = []
    real = forward.project

    def project(modules, x):
        inputs.extend([x] * len(modules))
        return real(modules, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "project", project)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            fast.logprobs(model, data)
    at = {x.untyped_storage().data_ptr() for x in kept}
    assert len(inputs) == 2 * 3 * 7 and not at & {x.untyped_storage().data_ptr() for x in inputs}
    R = 2 * (data.ids.shape[1] - 1)
    masks = {x.untyped_storage().data_ptr() for x in kept
             if x.dim() == 4 and x.shape[:3] == (1, len(data.prompts), R)}
    assert len(masks) == 1


@pytest.mark.parametrize("saves", [1, 10**9])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_given_up_leaves_nothing(recompute, saves, monkeypatch):
    """When memory runs out, the next try needs what the failed one held: checkpoints and the keys
    they computed held each other for good."""
    monkeypatch.setattr(passes, "SAVES", saves)  # with and without a pass over a common start
    times = 3 if saves == 1 else 2  # that the block is run
    model = tiny(layers=3)
    tinylora.adapt(model, 13)
    data = rollout(model, [(1, 2, 3), (1, 2, 4, 5), (1, 2, 6)])
    outputs = []

    def note(block, given, x):
        outputs.append(weakref.ref(x))
        if len(outputs) == fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
    model.layers[1].post_attention_layernorm.register_forward_hook(note)
    for fails in (None, *range(1, times + 1)):
        outputs.clear()
        try:
            fast.logprobs(model, data, recompute=recompute)
        except torch.OutOfMemoryError:
            pass
        assert len(outputs) == (fails or times) and all(ref() is None for ref in outputs), fails
