"""In which dtype a run keeps the frozen model, where --dtype does not say."""
import functools
import time

import torch
import torch.nn.functional as F

from support import ranks
from support.checkpoint import read_config
from support.hub import find_model

LARGE = 2**18  # numbers in a weight; the products of smaller models say little, and take no time
ROWS = 256
MOST = 2048  # rows and columns of the weight that is measured
FASTER = 0.8  # bf16 must take less than this part of fp32's time to be worth its rounding


def choose(args):
    """bf16 on a GPU; on a CPU, too, if it multiplies bf16 faster than fp32. Else, and where all
    weights are trained, fp32.

    Processors with AVX512-BF16 or AMX take half of fp32's time; those without take 4 to 8 times as
    long. What bf16 costs: sampler and trainer round differently (docs/running.md).
    """
    if args.method == "full":
        return "fp32"
    if args.device.startswith("cuda"):
        return "bf16"
    config = read_config(find_model(args.model))
    shape = config.intermediate_size, config.hidden_size
    # several ranks might measure differently, and must not
    if shape[0] * shape[1] < LARGE or ranks.LAUNCHED:
        return "fp32"
    return "bf16" if share_of_fp32(*shape) < FASTER else "fp32"


@functools.cache  # a sweep reads the flags of many runs, which must not differ
def share_of_fp32(d_out, d_in):
    """The time of a product in bf16 by its time in fp32, the best of three each."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        W = torch.ones(min(d_out, MOST), min(d_in, MOST), dtype=dtype)
        x = torch.ones(ROWS, W.shape[1], dtype=dtype)
        tries = []
        for _ in range(4):  # the first one is slower: kernels are chosen
            start = time.perf_counter()
            F.linear(x, W)
            tries.append(time.perf_counter() - start)
        best[dtype] = min(tries)
    return best[torch.bfloat16] / best[torch.float32]
