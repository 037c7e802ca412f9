"""The phases of a step on the GPU that does not exist (dry.py), for fit.py and bench/floor.py."""
from contextlib import suppress
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import grpo
import tinylora
from fast import sampling, training
from tools import dry


COUNTS = ("reads", "uploads", "operations", "flops", "moved", "product_bytes", "seconds")


class Enough(Exception):
    """A rollout has shown what it needs."""


def no_svd(weights, rank):
    """Factors of the right shapes: what the SVD itself needs is freed before the first step."""
    for W in weights:
        m, n = W.shape
        f = torch.float32
        yield W.new_empty(m, rank, dtype=f), W.new_empty(rank, dtype=f), \
            W.new_empty(n, rank, dtype=f), 0.0


class Model:
    """A model of a Config with 13 numbers on it, and what its phases count on `machine`.

    engine: the module grpo or fast. Prompts have `prompt` tokens, responses `tokens`, all the same.
    """

    def __init__(self, machine, config, engine, dtype=torch.bfloat16, svd=no_svd):
        self.machine = machine
        self.engine = engine
        self.model = dry.load(machine, config, dtype)
        v = tinylora.adapt(self.model, 13, svd=svd)
        self.optimizer = torch.optim.AdamW([v], lr=1e-3)
        self.resting = machine.live  # bytes of weights and adapter

    def sample(self, rows, group, prompt, tokens):
        """Bytes that a rollout needs at its peak, weights included. No row ends before the limit:
        after 4 tokens the cache goes on at its last 4 columns."""
        self.machine.reset()
        self.roll_out(rows, group, prompt, tokens, tokens - 2 * grpo.CHECK_EVERY)
        return self.machine.peak

    def decode(self, rows, group, prompt, column):
        """What a decoding step counts, about `column` tokens after the prompts:
        {name of a count of the Machine: its mean over 4 steps}."""
        self.roll_out(rows, group, prompt, column + 16, column, self.machine.reset)
        return {name: getattr(self.machine, name) / grpo.CHECK_EVERY for name in COUNTS}

    def roll_out(self, rows, group, prompt, tokens, jump, at_jump=lambda: None):
        """8 steps of a rollout; after 4 the cache goes on `jump` columns further."""
        place = grpo if self.engine is grpo else sampling
        make = place.Cache
        caches = []

        def remember(*args):
            caches.append(make(*args))
            return caches[0]

        def progress(done, ended):
            if done == 2 * grpo.CHECK_EVERY:
                raise Enough
            caches[0].used += max(0, jump)
            at_jump()
        prompts = [[1] * prompt for _ in range(rows // group)]
        noise = np.zeros((len(prompts) * group, tokens))
        with mock.patch.object(place, "Cache", remember), suppress(Enough):
            self.engine.generate(self.model, prompts, group, tokens, [-1], 1.0, noise, progress)

    def update(self, budget, group, prompt, tokens, recompute):
        """Bytes that an update needs at its peak, with micro-batches of up to `budget` tokens: one
        of them, of `self.rows` rows."""
        if self.engine is grpo:
            rows = max(1, budget // (prompt + tokens))
        else:
            P = budget // (prompt + group * tokens) + 1
            first = next(training.micro_batches(self.rollout(P * group, group, prompt, tokens),
                                                range(P * group), budget))
            rows = len(first)
        self.rows = rows
        rollout = self.rollout(rows, group, prompt, tokens)
        args = SimpleNamespace(clip_low=0.2, clip_high=0.4, kl=0.0, grad_clip=1.0, v_dtype="fp32",
                               recompute=recompute, tokens_per_micro_batch=budget)
        self.machine.reset()
        grpo.update(self.model, self.optimizer, rollout, args, self.engine)
        return self.machine.peak

    def rollout(self, rows, group, prompt, tokens):
        """Responses that all run to the limit, and all have a signal."""
        prompts = [[1 + row // group] * prompt for row in range(rows)]
        ids = torch.ones(rows, tokens, dtype=torch.long, device="cuda")
        return grpo.Rollout(prompts, ids, ids.bool(), torch.zeros(ids.shape, device="cuda"), 1.0,
                            torch.ones(rows, device="cuda"))
