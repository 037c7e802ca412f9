"""Small things that are done with a list of trained tensors."""
from contextlib import contextmanager

import torch


@contextmanager
def with_values(params, values):
    """Inside the block the trained tensors hold other values, also if the block is interrupted."""
    kept = [p.detach().clone() for p in params]
    try:
        for p, value in zip(params, values):
            p.detach().copy_(value)
        yield
    finally:
        for p, value in zip(params, kept):
            p.detach().copy_(value)


def total_norm(params):
    """The Euclidean norm of all numbers of all tensors together."""
    return sum(p.detach().double().square().sum().item() for p in params) ** 0.5


@torch.no_grad()
def reference_logprobs(run, rollout, params, reference):
    """(B, T) log-probs of a rollout under the policy that training started from, for --kl."""
    logp = torch.zeros_like(rollout.logp)
    with with_values(params, reference):
        for i in range(len(rollout.prompts)):  # row by row: as much memory as one row needs
            row = rollout.rows([i])
            logp[i, :row.ids.shape[1]] = run.engine.logprobs(run.model, row)[0]
    return logp
