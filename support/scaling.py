"""Weights near the limits of fp32, where solvers of the SVD fail."""
import math

import torch

from support.errors import InputError


def scaled(W):
    """(W / 2**e in fp32, e): dividing by a power of two rounds nothing.

    Weights of ordinary size have e = 0. InputError: W holds NaN or infinity.
    """
    W = W.float()
    largest = torch.stack(W.aminmax()).abs().max().item()
    if not math.isfinite(largest):
        raise InputError("the weight holds NaN or infinity: the checkpoint is damaged")
    e = math.frexp(largest)[1]
    if -20 < e < 20:
        return W, 0
    half = -e // 2  # in two factors: 2.0**-e itself may be infinite
    return W * 2.0**half * 2.0 ** (-e - half), e
