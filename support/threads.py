"""How many threads a model gets on a CPU, and what is computed side by side.

torch's threads wait for each other in every product. In a small model the products are so short
that one busy core makes all of them late: a toy step then takes four times as long, and on many
cores more threads are slower even on an idle machine. So a small model gets one thread inside
torch; the fast engine computes the micro-batches of an update side by side instead. With a model of
middle size it cuts rollouts and updates into two parts, each with half of the threads: what is too
small to be shared out within torch then has all cores, too. See docs/efficiency.md.
"""
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from support import ranks

SMALL = 20_000_000  # parameters; the toy has 0.9 million, SmolLM2 135 million
LARGE = 1_000_000_000  # above, reading the weights twice may cost more than it gains: not tried
PARTS = 2  # the same on every machine: a row's rounding depends on how many are beside it

parts = 1  # into which the fast engine cuts a rollout, and an update at least
workers = 1  # parts, or micro-batches of an update, that it computes at once
local = threading.local()  # .over: the Event of the pool that this thread belongs to


def choose_threads(model, device):
    """Decide once, at the start of a run. The user's (or torchrun's) OMP_NUM_THREADS counts for
    the number of cores: so many threads in all."""
    global parts, workers
    parts = 1
    workers = 1
    numbers = sum(p.numel() for p in model.parameters())
    if str(device).startswith("cuda") or numbers >= LARGE:
        return
    small = numbers < SMALL
    parts = 1 if small else PARTS
    if ranks.sharded:  # two threads' sums might cross
        return
    cores = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else usable_cores()
    workers = cores if small else min(cores, PARTS)
    if small:
        torch.set_num_threads(1)


def side_by_side(function, items, workers):
    """map(function, items), `workers` calls at once, which share torch's threads.

    Results come in order, and few wait to be taken: each may be large. After an error, or Ctrl-C,
    what has not begun is not begun, and unwanted() is true for what runs.
    """
    if workers == 1 or len(items) < 2:
        yield from map(function, items)
        return
    over = threading.Event()
    each = max(1, torch.get_num_threads() // workers)

    def begin():
        torch.set_num_threads(each)  # a thread's own: LAPACK, too, asks the one that calls it
        local.over = over
    pool = ThreadPoolExecutor(workers, initializer=begin)
    calls = deque()
    try:
        for item in items:
            calls.append(pool.submit(function, item))
            if len(calls) > workers:
                yield calls.popleft().result()
        while calls:
            yield calls.popleft().result()
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)


def unwanted():
    """Whether nobody waits any more for what this thread computes."""
    return hasattr(local, "over") and local.over.is_set()


def usable_cores():
    """The cores that this process may run on: in a container often fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS
