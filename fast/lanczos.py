"""The truncated SVD that TinyLoRA needs, without computing the full one.

On a decaying 18944 x 3584 weight this is some 60 times faster than torch.linalg.svd. (Not
torch.svd_lowrank: on noise its singular values are 0.5% low even after 32 iterations.)
"""
import math

import numpy as np
import torch

import tinylora
from support import threads
from support.scaling import scaled

EXTRA = 6  # columns of a block beyond the wanted rank: they speed up convergence
BLOCKS = 3  # that the basis grows by before the small problem is solved
LARGEST = 12  # blocks in the basis before it is cut back to the best 3
ROUNDS = 25  # of growing and solving; then the full SVD
TOLERANCE = 1e-5  # largest ||W^T u - s v|| that is accepted, relative to the first singular value
CACHED = 2**20  # numbers that a CPU's cache holds between two products
THREADS = 8  # at most: each may hold a copy of its matrix in fp32


@torch.no_grad()
def truncated_svd(W, rank, tol=TOLERANCE):
    """As tinylora.truncated_svd: U (m, rank), S (rank,), V (n, rank), residual, all fp32.

    Block Lanczos with thick restarts, on W^T W: subspace iteration that keeps its past. A pass over
    W adds to an orthonormal basis K what W^T W makes of the last block of columns. After every
    three passes the problem is solved within the basis, where it is small. So a few passes over W
    do what dozens of plain power iterations do. It stops when ||W^T u - s v|| <= tol * s_1 for each
    of the wanted triplets; the largest of these norms over s_1 is the residual returned. Nearly
    equal singular values may keep it from converging; then a full SVD is taken, as it is where W is
    so small that the basis would fill the space. InputError: W holds NaN or infinity.
    """
    if W.is_meta or rank > min(W.shape):  # all triplets: from one solver in both engines
        return tinylora.truncated_svd(W, rank)
    m, n = W.shape
    W, e = scaled(W)
    A = W if n <= m else W.T  # iterate on the shorter side: A (long, short)
    found = None
    if A.shape[1] >= 16 * (rank + EXTRA):
        found = lanczos(A, rank, tol)
    if found is not None:
        S, right, residual = found
        left = A @ right / S
    else:
        left, S, right, residual = tinylora.truncated_svd(A, rank)
    U, V = (left, right) if n <= m else (right, left)
    sign = torch.where(U.double().sum(0) < 0, -1.0, 1.0).to(W)  # the rule for signs
    return U * sign, (S.double() * 2.0**e).float(), V * sign, residual


def lanczos(A, rank, tol):
    """S (rank,), right singular vectors (short, rank) and residual of A; None: no convergence."""
    parts = (A,) if A.is_cuda else A.split(max(1, CACHED // A.shape[1]))
    width = rank + EXTRA
    start = np.random.RandomState(0).standard_normal((A.shape[1], width))
    block = torch.from_numpy(start).to(A)  # (short, width)
    K = A.new_empty(A.shape[1], 0)  # the basis
    Z = K  # A^T A K
    for _ in range(ROUNDS):
        for _ in range(BLOCKS):
            # twice is enough in theory; but once the basis holds all of A, what a block adds is
            # rounding, itself mostly in the basis
            for _ in range(3):
                block = torch.linalg.qr(block - K @ (K.T @ block))[0]
            # A^T (A block); with A.T on the left it would be several times slower
            new = sum(block.T @ part.T @ part for part in parts).T
            K = torch.cat((K, block), 1)
            Z = torch.cat((Z, new), 1)
            block = new
        small = (K.T @ Z).double()
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        vectors = vectors[:, -3 * width:].flip(1).to(A)  # descending
        S = values[-width:].flip(0).clamp(min=1e-30).sqrt().to(A)  # (width,)
        lead = vectors[:, :width]
        right = K @ lead  # (short, width)
        block = Z @ lead - right * S**2  # what is missing, and what the basis grows by next
        missing = block[:, :rank].norm(dim=0).tolist()
        top = S[:rank].tolist()
        residual = max(x / s for x, s in zip(missing, top)) / top[0]
        if residual <= tol:
            break
        if K.shape[1] >= LARGEST * width:
            K = K @ vectors
            Z = Z @ vectors
    if residual <= 10 * tol:
        return S[:rank], right[:, :rank], residual
    return None


def svd(weights, rank):
    """truncated_svd of each weight in turn, as tinylora.svd.

    On a CPU a matrix a thread, not all threads on one matrix: the products are small, so that is
    faster, and no sum depends on the number of threads.
    """
    if not weights or weights[0].device.type != "cpu":
        yield from (truncated_svd(W, rank) for W in weights)
        return
    before = torch.get_num_threads()
    workers = min(max(before, threads.workers), THREADS)
    try:
        torch.set_num_threads(1)
        yield from threads.side_by_side(lambda W: truncated_svd(W, rank), weights, workers)
    finally:
        torch.set_num_threads(before)
