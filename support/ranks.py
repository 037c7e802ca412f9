"""Several processes (ranks) that train one model: torchrun --nproc_per_node N train.py ...

Every rank loads the model and samples its share of the problems. Before each update the gradients
are summed over the ranks, so all ranks make the same step; 13 trained numbers are 52 bytes.
Otherwise only a few sums for the log and the texts of evaluations are sent. Rank 0 alone prints
and writes files. Without torchrun there is one rank, and nothing is sent.

With --shard (fast/shard.py) the ranks hold parts of one model and do the same work on the same
problems: nothing is shared out, and sums for the log are complete on every rank.
"""
import json
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from support.errors import InputError

# torchrun sets this variable. WORLD_SIZE is no sign of it: some clusters set that everywhere.
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # the rank's number on its machine
sharded = False  # --shard; set by join
PATIENCE = timedelta(minutes=30)  # for a rank that hangs; one that ends is noticed at once


class Alone(InputError):
    """Another rank has ended, so this one cannot go on."""


def device(name):
    """The device of this rank: under torchrun, --device cuda is the GPU with the rank's number."""
    if LAUNCHED and name.startswith("cuda"):
        return f"cuda:{LOCAL}"
    return name


@contextmanager
def communication():
    """A block that waits for the other ranks. Raises Alone if one of them cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        reason = first_line.split(". ")[0][:200]
        raise Alone(f"another of the {SIZE} ranks has ended or cannot be reached "
                    f"({reason})") from None


def join(device, shard=False):
    """Connect to the other ranks. From here on, ranks other than 0 print nothing."""
    global sharded
    sharded = shard
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # CUDA graphs and memory figures use the current device
    if not LAUNCHED:
        return
    if RANK:
        sys.stdout = open(os.devnull, "w")
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    with communication():
        dist.init_process_group(backend, timeout=PATIENCE)


def leave():
    """Disconnect from the other ranks."""
    if LAUNCHED:
        dist.destroy_process_group()


def share(n):
    """The slice of range(n) that belongs to this rank: in order, as even as possible."""
    if sharded:
        return slice(n)
    return slice(n * RANK // SIZE, n * (RANK + 1) // SIZE)


def total(*numbers):
    """Each number's sum over the ranks, as a list."""
    if not LAUNCHED or sharded:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    with communication():
        dist.all_reduce(sums)
    return sums.tolist()


def mean(x):
    """The mean of a tensor's entries over all ranks."""
    amount, count = total(x.double().sum().item(), x.numel())
    return amount / count


def add_gradients(params):
    """Replace each p.grad by its sum over the ranks."""
    if not LAUNCHED:
        return
    with communication():
        for work in [dist.all_reduce(p.grad, async_op=True) for p in params]:
            work.wait()


def gather(rows):
    """The lists of all ranks as one list, in the order of the ranks."""
    return rows if sharded else everyone(rows)


def everyone(rows):
    """gather, also where the ranks' lists are the same ones.

    The rows are sent as JSON: torch's own function for objects uses pickle.
    """
    if not LAUNCHED:
        return rows
    data = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(SIZE)]
    with communication():
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(sizes).item()
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(SIZE)]
        padding = longest - len(data)
        dist.all_gather(parts, torch.nn.functional.pad(data, (0, padding)))
    gathered = []
    for part, size in zip(parts, sizes):
        gathered += json.loads(part[:size].numpy().tobytes())
    return gathered


def agree(value, what):
    """InputError unless a number is equal on all ranks, up to rounding.

    Without this check, ranks that train different models would go unnoticed.
    """
    values = everyone([value])
    if max(values) - min(values) > 1e-6 * max(map(abs, values)):
        raise InputError(f"the ranks differ in {what}: {values}")
