"""How many threads a small model gets on a CPU.

torch's threads wait for each other in every product. In a small model the products are so short
that one busy core makes all of them late: a toy step then takes four times as long, and on many
cores more threads are slower even on an idle machine. So a small model gets one thread inside
torch; the fast engine computes the micro-batches of an update side by side instead. What was
measured is in docs/efficiency.md.
"""
import os

import torch

SMALL = 20_000_000  # parameters; the toy has 0.9 million, SmolLM2 135 million

workers = 1  # micro-batches that the fast engine computes at once; set by choose_threads


def choose_threads(model, device):
    """Decide once, at the start of a run. The user's (or torchrun's) OMP_NUM_THREADS stays."""
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
    return os.cpu_count() or 1  # macOS
