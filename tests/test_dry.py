"""A whole step on a GPU that does not exist (tools/dry.py), with both engines: which device every
tensor is on, and how often the host waits for it."""
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import LLAMA3, config

import fast
import grpo
import model as transformer
import tinylora
from fast import cache, lanczos, sampling, training
from tools import dry
from tools.machine import Mistake

ENGINES = {"plain": grpo, "fast": fast}
ARGS = SimpleNamespace(clip_low=0.2, clip_high=0.4, kl=0.0, grad_clip=1.0, v_dtype="fp32",
                       recompute=False, tokens_per_micro_batch=1000)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10], [11]]


def adapted(machine, engine, c=None):
    model = dry.load(machine, c or config(layers=1), torch.bfloat16)
    return model, tinylora.adapt(model, 7, svd=engine.svd)


def sample(engine, model, tokens, group=4, stops=(-1,)):
    noise = np.zeros((len(PROMPTS) * group, tokens))
    return engine.generate(model, PROMPTS, group, tokens, stops, 1.0, noise)


def whole_step(engine, c=config(hidden=160, mid=192)):
    """Load, adapt, sample, update, and what train.py reads for the log."""
    with dry.gpu() as machine:
        model, v = adapted(machine, engine, c)
        rollout = sample(engine, model, 5)
        rollout.advantage = torch.ones(len(rollout.prompts), device="cuda")
        optimizer = torch.optim.AdamW([v], lr=1e-3)
        for recompute in (False, True):
            args = SimpleNamespace(**vars(ARGS) | {"recompute": recompute})
            grpo.update(model, optimizer, rollout, args, engine)
        assert v.device.type == rollout.ids.device.type == "cuda" and v.grad.shape == v.shape
    return machine


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("kw", [dict(heads=7, kv=1), dict(tied=False, kind="llama",
                                                          scaling=LLAMA3)], ids=str)
def test_a_step_keeps_to_its_device(engine, kw):
    """A tensor made on the CPU; a view that only a CPU's attention allows (the plain engine had
    one); products in fp64, which a GPU has hardly any units for."""
    machine = whole_step(engine, config(hidden=160, mid=192, **kw))
    assert machine.double_flops < 0.02 * machine.flops


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_the_products_of_all_weights_are_counted(engine):
    """One by addmm_, as the fast engine's in bf16, was not."""
    with dry.gpu() as machine:
        model, _ = adapted(machine, engine)
        layers = [m for m in model.modules() if isinstance(m, tinylora.TinyLoRALinear)]
        numbers = sum(layer.base.weight.numel() for layer in layers)
        machine.reset()
        rollout = sample(engine, model, 5)
    decoded = len(rollout.ids) * 4  # the last token is not fed back
    assert machine.flops > 2 * numbers * decoded


# file, where in it, what stands there, what a mistaken hand would write
MUTANTS = [
    (grpo, "generate", "dtype=torch.bool, device=device)", "dtype=torch.bool)"),
    (grpo, "logprobs", "start[:, None] + torch.arange(T, device=device)",
     "start[:, None] + torch.arange(T)"),
    (transformer, "Cache", "dtype=torch.long, device=like.device)", "dtype=torch.long)"),
    (tinylora, "truncated_svd", "-1.0, 1.0).to(W)", "-1.0, 1.0).cpu()"),
    (sampling, "sample_rows", "rows = torch.arange(B, device=device)", "rows = torch.arange(B)"),
    (training, "logprobs", "in rollout.prompts], device=device)", "in rollout.prompts])"),
    (cache, "Cache", "rows = torch.arange(P * group, device=device)",
     "rows = torch.arange(P * group)"),
    (lanczos, "lanczos", "torch.from_numpy(start).to(A)", "torch.from_numpy(start).to(A.dtype)")]


@pytest.mark.parametrize("module,name,right,wrong", MUTANTS,
                         ids=[f"{m.__name__}.{name}" for m, name, *_ in MUTANTS])
def test_a_tensor_made_on_the_cpu_is_found(module, name, right, wrong, monkeypatch):
    """In generate, logprobs, the cache and the SVD of both engines."""
    source = inspect.getsource(getattr(module, name))
    assert source.count(right) == 1
    space = dict(vars(module))
    exec(source.replace(right, wrong), space)
    before = getattr(module, name)
    for user in (module, grpo, fast, sampling, tinylora):  # whoever imported it by its name
        if vars(user).get(name) is before:
            monkeypatch.setattr(user, name, space[name])
    engine = grpo if module in (grpo, transformer, tinylora) else fast
    with pytest.raises(Mistake, match="both devices"):
        whole_step(engine)


# ---------------------------------------------------------------------- what the host waits for

@pytest.mark.parametrize("engine,graphs", [(grpo, False), (fast, False), (fast, True)],
                         ids=[*ENGINES, "graph"])
def test_the_host_looks_every_fourth_token(engine, graphs):
    """A look more per token: `if done.all()`, a progress bar, a Python number for a position."""
    reads = {}
    with dry.gpu() as machine:
        model, _ = adapted(machine, engine)
        if graphs:
            fast.use_graphs(model)
        for tokens in (9, 17):
            machine.reset()
            sample(engine, model, tokens)
            reads[tokens] = machine.reads
            assert machine.uploads <= 5  # prompts, lengths, stops, noise; none per token
    assert reads[17] - reads[9] == 8 / grpo.CHECK_EVERY


def leaving():
    """In the place of torch.isin: of the rows that are left, the first half ends now and then."""
    seen = []

    def isin(token, stops):
        seen.append(0)
        ended = torch.zeros_like(token, dtype=torch.bool)
        if len(seen) % 8 == 4:
            ended[:len(token) // 2] = True
        return ended
    return isin


def test_rows_that_leave_cost_a_few_looks(monkeypatch):
    """Each time rows leave: which ones, which prompts are left, how many rows each."""
    with dry.gpu() as machine:
        model, _ = adapted(machine, fast)
        machine.reset()
        sample(fast, model, 25)
        plain = machine.reads
        monkeypatch.setattr(torch, "isin", leaving())
        machine.reset()
        rollout = sample(fast, model, 25)
        left = rollout.mask.sum(0).cpu()
    drops = int((left[1:] < left[:-1]).sum())
    assert drops >= 2 and machine.reads - 1 - plain <= 3 * drops


@pytest.mark.parametrize("engine,each", [(grpo, 6), (fast, 9)], ids=ENGINES)
def test_reads_of_an_update(engine, each):
    """One more per update (now 7) or per micro-batch: a mask as an index, a size, a figure."""
    parts = []
    counting = SimpleNamespace(accumulate=engine.accumulate, logprobs=lambda *args: (
        parts.append(0) or engine.logprobs(*args)))
    with dry.gpu() as machine:
        model, v = adapted(machine, engine)
        rollout = sample(engine, model, 10)
        rollout.advantage = torch.ones(len(rollout.prompts), device="cuda")
        optimizer = torch.optim.AdamW([v], lr=1e-3)
        for budget in (10**6, 80, 40):
            machine.reset()
            parts.clear()
            args = SimpleNamespace(**vars(ARGS) | {"tokens_per_micro_batch": budget})
            grpo.update(model, optimizer, rollout, args, counting)
            assert machine.reads == 7 + each * len(parts)
    assert len(parts) > 4
