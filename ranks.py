"""Several processes, one run: torchrun --nproc_per_node N train.py ...

Every rank loads the model and samples its own share of the problems; the gradient is added up over the ranks before each update,
so that all take the same step: as many numbers as are trained, 52 bytes for 13. Beyond that a few sums for the log and, at
evaluations, the texts travel. Rank 0 alone prints and writes. Without torchrun every function here hands back what it was given.
"""
import json
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from files import InputError

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # WORLD_SIZE alone would not do: some clusters set it for every program
RANK, SIZE, LOCAL = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if LAUNCHED else (0, 1, 0)
PATIENCE = timedelta(minutes=30)  # for a rank that hangs: longer than any honest wait. A rank that dies is noticed at once


def device(name):
    """Under torchrun, cuda is the GPU that has the number of this rank."""
    return f"cuda:{LOCAL}" if LAUNCHED and name.startswith("cuda") else name


class Alone(InputError):
    """Another rank is gone, so this one cannot go on."""


@contextmanager
def company():
    """Around all that waits for the others: tells in a line that one of them is gone, in place of the library's page."""
    try:
        yield
    except RuntimeError as error:
        raise Alone(f"another of the {SIZE} ranks has ended or cannot be reached ({str(error).strip().splitlines()[0].split('. ')[0][:200]})") from None


def join(device):
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # captures and memory figures are the current device's
    if LAUNCHED:
        if RANK:
            sys.stdout = open(os.devnull, "w")
        with company():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)


def leave():
    if LAUNCHED:
        dist.destroy_process_group()


def share(n):
    """The part of range(n) that is this rank's: in order, as even as can be."""
    return slice(n * RANK // SIZE, n * (RANK + 1) // SIZE)


def total(*numbers):
    """Each number's sum over the ranks, a list."""
    if not LAUNCHED:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    with company():
        dist.all_reduce(sums)
    return sums.tolist()


def mean(x):
    """The mean of a tensor's entries, over all ranks."""
    amount, count = total(x.double().sum().item(), x.numel())
    return amount / count


def add_gradients(params):
    """Each p.grad becomes the sum over the ranks."""
    if LAUNCHED:
        with company():
            for work in [dist.all_reduce(p.grad, async_op=True) for p in params]:
                work.wait()


def gather(rows):
    """All ranks' lists of rows as one, in the ranks' order. They travel as JSON: torch's own way for objects is pickle."""
    if not LAUNCHED:
        return rows
    mine = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(SIZE)]
    with company():
        dist.all_gather(sizes, torch.tensor([len(mine)]))
        parts = [torch.zeros(max(sizes).item(), dtype=torch.uint8) for _ in range(SIZE)]
        dist.all_gather(parts, torch.nn.functional.pad(mine, (0, len(parts[0]) - len(mine))))
    return [row for part, size in zip(parts, sizes) for row in json.loads(part[:size].numpy().tobytes())]


def agree(value, what):
    """InputError unless a number is the same on all ranks (but for rounding): they would train different models unnoticed."""
    values = gather([value])
    if max(values) - min(values) > 1e-6 * max(map(abs, values)):
        raise InputError(f"the ranks differ in {what}: {values}")
