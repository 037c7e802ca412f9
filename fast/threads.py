"""How many threads work on a small model, and what they share out.

torch's threads wait for each other in every product. In a small model these are so short that one
busy core makes all of them late: a toy step takes 4 times as long, and on many cores more threads
are slower even on an idle machine. So a small model on a CPU gets one thread inside torch, and the
micro-batches of an update, which need nothing of each other, are computed side by side. What was
measured is in docs/efficiency.md. Results do not depend on the number of workers.
"""
import builtins
import os
from concurrent.futures import ThreadPoolExecutor

import torch

SMALL = 20_000_000  # parameters; the toy has 0.9 million, the smallest model of use 135 million

workers = 1  # micro-batches computed at once; set by choose


def choose(model, device):
    """Decide once, at the start of a run. An OMP_NUM_THREADS of the user's (or torchrun's) stays."""
    global workers
    workers = 1
    small = sum(p.numel() for p in model.parameters()) < SMALL
    if small and not str(device).startswith("cuda") and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        workers = usable_cores()


def usable_cores():
    """The cores that this process may run on: in a container often fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows


def map(function, items):
    """The built-in map, with up to `workers` calls at once; results come in order."""
    if workers == 1 or len(items) < 2:
        yield from builtins.map(function, items)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(function, items)
    finally:  # an error, or Ctrl-C: what has not begun is not begun
        pool.shutdown(cancel_futures=True)
