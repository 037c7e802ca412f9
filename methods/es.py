"""--algo es: search over v without gradients (Salimans et al., arXiv 1703.03864), in place of GRPO.

No backward pass: whatever can be sampled can be trained. Each problem of a step is answered by
G / 2 pairs of policies, v + sigma e and v - sigma e, with a new random e for every pair. The two of
a pair share the problem and the sampling noise, so what differs between them comes from e.

    gradient = - mean over pairs of (reward of v + sigma e - reward of v - sigma e) / (2 sigma) * e

Adam does the rest. Most pairs have equal rewards and contribute nothing. All P * G policies are
rows of one batch, each with its own v (`values` of fast.generate).
"""
import numpy as np
import torch

import grpo
from support import ranks


def step(run, optimizer, rows, positions, rates, roll_out, score):
    """One step on v, one update.

    rows: P problems; positions: their numbers in the run, which seed e and the sampling noise.
    rates: [the update's learning rate]. roll_out, score: train.py's. Returns (rollout of P * G
    rows, their scores, [metrics]).
    """
    args = run.args
    optimizer.param_groups[0]["lr"], = rates
    v, = optimizer.param_groups[0]["params"]  # (ties, u)
    pairs = args.group // 2
    keys = [(args.seed, position, k) for position in positions for k in range(pairs)]
    directions = [np.random.RandomState([6, *key]).standard_normal(v.shape) for key in keys]
    e = torch.from_numpy(np.stack(directions)).to(v)  # (P * pairs, ties, u)
    values = torch.stack((v + args.sigma * e, v - args.sigma * e), 1)  # (P * pairs, 2, ties, u)
    values = values.flatten(0, 1).detach()  # (P * G, ties, u): +, -, +, - ...
    noise = grpo.uniforms([[3, *key] for key in keys for _ in range(2)], args.max_new_tokens)

    rows = [row for row in rows for _ in range(args.group)]  # a prompt for every v
    label = f"step {positions[0] // args.prompts + 1}"
    rollout = roll_out(run, rows, 1, noise, args.temperature, label, values=values)
    _, scores = score(run, rollout, rows)

    plus, minus = scores[args.reward].view(-1, 2).unbind(1)  # (P * pairs,) each
    slope = ((plus - minus) / (2 * args.sigma)).to(v)  # (P * pairs,)
    pairs_in_all, = ranks.total(len(slope))
    v.grad = -torch.einsum("n,ntu->tu", slope, e) / pairs_in_all
    norm = grpo.optimizer_step(optimizer, args)  # sums v.grad over the ranks
    return rollout, scores, [{"grad_norm": norm, "signal": ranks.mean(slope != 0)}]
