"""Small things that are done with a list of trained tensors, and with their settings."""
from contextlib import contextmanager
from dataclasses import replace

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


def not_none(**settings):
    """The settings that have a value: the others have a default where they are used."""
    return {name: value for name, value in settings.items() if value is not None}


def total_norm(params):
    """The Euclidean norm of all numbers of all tensors together."""
    return sum(p.detach().double().square().sum().item() for p in params) ** 0.5


def reference_logprobs(run, mini_batch, optimizer, reference):
    """(B, T) log-probs of a mini-batch under the policy that training started from, for --kl.

    Meanwhile the trained tensors, which the optimizer knows, hold the values `reference`.
    They are computed in the very micro-batches of grpo.update, so while the policy is still the
    reference they are equal to the last bit. Else rounding would leave a gradient, and Adam would
    make a whole step of it.
    """
    logp = torch.zeros_like(mini_batch.logp)
    numbers = torch.arange(len(logp), device=logp.device)
    numbered = replace(mini_batch, advantage=numbers)  # so that a micro-batch knows its rows

    def store(micro_batch):  # and no terms of a sum
        with torch.no_grad():  # here: the fast engine's threads do not see it from outside
            width = micro_batch.ids.shape[1]
            logp[micro_batch.advantage, :width] = run.engine.logprobs(run.model, micro_batch)
        return []

    with with_values(optimizer.param_groups[0]["params"], reference):
        budget = run.args.tokens_per_micro_batch
        run.engine.accumulate(store, numbered, numbers.tolist(), budget)
    return logp
