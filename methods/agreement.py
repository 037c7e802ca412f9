"""--agreement: an update is as long as separate mini-batches agree. For every method and --algo.

Adam divides the gradient by its usual size, so its steps are as long without a signal as with one:
where the rewards say nothing, v walks at random. Here the rate of an update is lr times the part
of Adam's direction that new mini-batches, which had no part in it, confirm beyond chance:

    agreement = (dot - 2 sqrt(variance)) / square, kept between 0 and 1

    dot       mean of the sum of g m                     over all trained numbers
    square    mean of the sum of m m
    variance  of dot, if g is noise with a mean of 0: from the sums of (g m)^2

g is the new gradient, m Adam's first moment before it, both divided by the square root of Adam's
second moment with it. The means are over about the last 20 updates. dot / square is 1 if all
gradients are equal, about 0 if they are independent of each other with mean 0; then 98 of 100
updates leave v as it is. So does the first one, which has nothing to agree with.

Not in the paper. The same question is asked of a batch's size in arXiv 1812.06162.
"""
import torch

DECAY = 0.95  # of the means, an update
CHANCE = 2.0  # standard errors of `dot` that chance may reach


def start(optimizer):
    """From now on every step of this torch.optim.AdamW has its rate scaled by the agreement.

    The means are scalars beside each trained tensor's moments: "dot", "square", "variance".
    """
    optimizer.register_step_pre_hook(scale)


@torch.no_grad()
def scale(optimizer, args, kwargs):
    """Multiply the rate that was set for this update; called by its step()."""
    group, = optimizer.param_groups
    beta1, beta2 = group["betas"]
    means = {"dot": 0.0, "square": 0.0, "variance": 0.0}  # of all trained tensors together
    for p in group["params"]:
        state = optimizer.state[p]
        if "step" not in state:  # the first update
            continue
        updates = state["step"].item()
        q = torch.lerp(p.grad.square(), state["exp_avg_sq"], beta2) / (1 - beta2 ** (updates + 1))
        m = state["exp_avg"] / (q.sqrt() + group["eps"])
        g = p.grad / (q.sqrt() + group["eps"])
        gm = (1 - beta1 ** updates) * g * m  # m began at 0: its mean is this part of g's
        new = 1 - DECAY
        state["dot"] = DECAY * state.get("dot", 0.0) + new * gm.sum()
        state["square"] = DECAY * state.get("square", 0.0) + new * (m * m).sum()
        # the terms of `dot` are independent, so their variances add up, with squared weights
        state["variance"] = DECAY**2 * state.get("variance", 0.0) + new**2 * (gm * gm).sum()
        means = {name: total + state[name].item() for name, total in means.items()}
    confirmed = means["dot"] - CHANCE * means["variance"] ** 0.5
    agreement = min(1.0, max(0.0, confirmed / means["square"])) if means["square"] else 0.0
    group["lr"] *= agreement
