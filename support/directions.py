"""--directions: which r singular triplets (u_i, s_i, v_i) of a weight W the adapter uses.

    top      the r largest, as the paper: what an adapter has that does not say
    middle   r around the middle of the spectrum
    bottom   the r smallest
    random   r of all, others for every module

The formula stays U S R V^T. So where S is small, the same step of v moves W less: bottom at top's
learning rate is next to nothing. A fair comparison needs a rate of its own for each, say one with
lr x S alike. Other triplets than the top ones take a full SVD, in both engines (fast/lanczos.py
finds the top ones only). In the middle of a spectrum neighbours are nearly equal: there, another
processor or dtype may turn them into each other more than it does the top ones.
"""
import numpy as np

KINDS = ("top", "middle", "bottom", "random")
ALL = 2**20  # triplets, more than any weight has: as a rank, it asks a solver for all of them


def pick(factors, kind, rank, seed, index):
    """Of factors U (m, k), S (k,), V (n, k), residual: the `rank` triplets of module `index`.

    k is rank for top, else the number of all triplets. S descends. A random choice has a stream of
    its own, see tinylora.random_P.
    """
    if kind == "top":
        return factors
    U, S, V, residual = factors
    if kind == "random":
        at = np.sort(np.random.RandomState([8, seed, index, 0]).permutation(len(S))[:rank])
    else:
        start = {"middle": (len(S) - rank) // 2, "bottom": len(S) - rank}[kind]
        at = np.arange(start, start + rank)
    return U[:, at], S[at], V[:, at], residual
