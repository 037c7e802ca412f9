"""--algo es: an antithetic evolution strategy over v, instead of GRPO (Salimans et al., arXiv 1703.03864).

No backward pass: whatever can be sampled can be trained. In every step each of P problems is answered by G / 2 pairs of policies,
v + sigma e and v - sigma e, with a new e for every pair; the two of a pair share the problem and the sampling noise, so that their
difference is e's doing. All P * G policies are rows of one batch (tinylora.many).

    gradient = - mean over pairs of (reward of v + sigma e  -  reward of v - sigma e) / (2 sigma) * e

and Adam takes it from there. Pairs of equal reward, most of them, contribute nothing.
"""
import numpy as np
import torch

import grpo
import ranks
import tinylora


def step(model, v, optimizer, problems, keys, args, lr, respond, score):
    """One step on v. problems: P rows; keys: two seed words for each. respond(problems, noise, which) samples and returns what
    train.merge does, score(ids, mask, problems) judges. Returns (metrics, mask of what was sampled)."""
    pairs, rows = args.group // 2, [p for p in problems for _ in range(args.group)]
    seeds = [(*key, k) for key in keys for k in range(pairs)]
    e = torch.from_numpy(np.stack([np.random.RandomState([6, *seed]).standard_normal(v.shape) for seed in seeds])).to(v)  # (P * pairs, groups, u)
    values = torch.stack((v + args.sigma * e, v - args.sigma * e), 1).flatten(0, 1).detach()  # (P * G, groups, u): +, -, +, - ...
    noise = grpo.uniforms([[3, *seed] for seed in seeds for _ in range(2)], args.max_new_tokens)
    with tinylora.many(model, values):
        _, ids, mask, _ = respond(rows, noise, np.arange(len(rows)))
    scores = score(ids, mask, rows)
    plus, minus = scores[args.reward].view(-1, 2).unbind(1)  # (P * pairs,)
    slope = ((plus - minus) / (2 * args.sigma)).to(v)
    pairs_in_all, = ranks.total(len(slope))
    v.grad = -torch.einsum("n,ngu->gu", slope, e) / pairs_in_all
    norm = grpo.optimizer_step([v], optimizer, lr, args.grad_clip, tinylora.DTYPES[args.v_dtype])
    return {kind: ranks.mean(s) for kind, s in scores.items()} | {"signal": ranks.mean(slope != 0), "grad_norm": norm, "v_norm": grpo.total_norm([v])}, mask
