"""A control: train.py, with the rewards of every group dealt out anew among its responses.

    python -m tools.shuffled --params 13 --seed 1 --out runs/shuffled ...     (train.py's flags)

Groups keep their rewards, so at first advantages, step sizes and the number of groups with a signal
are as large as without this; but they say nothing of the responses. What such a run gains, a run
gains without learning from its rewards. Of the run's folder only config.json tells that it was one
of these ("shuffled"): name it so.
"""
import sys

import numpy as np
import torch

import grpo
import train
from support import program
from support.errors import InputError


def shuffled(rewards, rng):
    """(P, G) -> (P, G): each row in a random order of its own."""
    orders = np.stack([rng.permutation(rewards.shape[1]) for _ in rewards])
    return rewards.gather(1, torch.from_numpy(orders).to(rewards.device))


def flags(argv):
    args = train.flags(argv)
    if args.resume:
        raise InputError("--resume: the order in which a control deals out rewards is not kept; "
                         "start it anew")
    if args.algo != "grpo" or args.eval_only or args.chat:
        raise InputError("tools.shuffled: deals out the rewards of a training run by GRPO")
    args.shuffled = True  # for config.json: train.py --resume would go on with real rewards
    return args


def work(args):
    real = grpo.advantages
    rng = np.random.RandomState([9, args.seed, 0, 0])  # see tinylora.random_P
    grpo.advantages = lambda rewards: real(shuffled(rewards, rng))
    try:
        return train.work(args)
    finally:
        grpo.advantages = real


def main(argv=None):
    """Returns the exit code, see program.run_main."""
    return program.run_main(lambda: flags(argv), work)


if __name__ == "__main__":
    sys.exit(main())
