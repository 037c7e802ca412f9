"""Peaks of memory as tools/probe.py counts them, beside those measured on a CPU:

    python bench/memory.py FOLDER           # a model's folder: SmolLM2-135M's, say

In fp32, sampling and one update, what each needs beyond the weights. Measured: the growth of the
process's largest resident size (VmHWM) while it runs, with a malloc that gives everything beyond
64 KiB back at once. Both engines' code is the same on a GPU; attention's kernel is another there,
and so is the allocator. The last line is JSON.
"""
import ctypes
import gc
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# rows, rows a group, tokens of a prompt and of a response, recompute
SETTINGS = [(12, 1, 48, 16, False), (8, 4, 32, 16, False), (32, 8, 96, 32, True)]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",
          "MALLOC_TOP_PAD_": "0", "OMP_NUM_THREADS": "1"}


def resident(name):
    """VmRSS, or VmHWM, the peak: bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])


def grown(f):
    """How far the resident size rises above where it is, while f() runs; after a run to warm up."""
    f()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # small blocks come from a heap, which keeps what is free
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    f()
    return resident("VmHWM") - before


def measured(folder, engine, settings):
    """[(sampling, update) of each setting], bytes."""
    import numpy as np
    import torch

    import grpo
    import model as transformer
    import tinylora
    from common import settings as recipe
    from fast import head, packed
    from tools.probe import no_svd

    packed.MOST = 0  # no copies of weights: only sampling on a CPU makes them
    head.SAMPLED = head.TRAINED = 2**62  # nor small pieces of logits
    model = transformer.load(folder, torch.float32)
    v = tinylora.adapt(model, 13, svd=no_svd)
    for module in model.modules():
        if isinstance(module, tinylora.TinyLoRALinear):
            module.US.zero_()
            module.Vt.zero_()
    optimizer = torch.optim.AdamW([v], lr=1e-3)
    results = []
    for rows, group, prompt, tokens, recompute in settings:
        rng = np.random.RandomState(0)
        prompts = rng.randint(0, 500, (rows // group, prompt)).tolist()
        noise = rng.random_sample((rows, tokens))
        rollouts = []

        def sample():
            rollouts[:] = [engine.generate(model, prompts, group, tokens, [-1], 1.0, noise)]

        def update():
            [rollout] = rollouts
            rollout.advantage = torch.ones(rows)
            grpo.update(model, optimizer, rollout, args, engine)
        args = recipe("cpu", recompute=recompute, tokens_per_micro_batch=10**9)
        results.append((grown(sample), grown(update)))
    return results


def counted(folder, engine, settings):
    import torch

    from support.checkpoint import read_config
    from tools import dry
    from tools.probe import Model

    results = []
    with dry.gpu(attention=dry.cpu_attention) as machine:
        model = Model(machine, read_config(folder), engine, torch.float32)
        for rows, group, prompt, tokens, recompute in settings:
            sampling = model.sample(rows, group, prompt, tokens)
            budget = rows // group * (prompt + group * tokens)
            update = model.update(budget, group, prompt, tokens, recompute)
            results.append((sampling - model.resting, update - model.resting))
    return results


def main(folder, number=len(SETTINGS)):
    import fast
    rows = []
    both = zip(SETTINGS, measured(folder, fast, SETTINGS[:int(number)]),
               counted(folder, fast, SETTINGS[:int(number)]))
    for setting, real, dry in both:
        for phase, a, b in zip(("sampling", "update"), real, dry):
            rows.append({"setting": setting, "phase": phase, "measured MB": round(a / 1e6, 1),
                         "counted MB": round(b / 1e6, 1), "ratio": round(b / a, 3)})
            print(rows[-1], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    main(*sys.argv[1:])
