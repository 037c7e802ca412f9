"""--agreement: an update is as long as separate mini-batches agree. For every method and --algo.

Adam divides the gradient by its usual size, so its steps are as long without a signal as with one:
where the rewards say nothing, v walks at random. Here the rate of an update is lr times the part
of Adam's direction that the new mini-batch, which had no part in it, confirms:

    agreement = mean of g . m / q  /  mean of m . m / q      (kept between 0 and 1)

g is the new gradient, m Adam's first moment before it, q the second moment with it; the means are
over about the last 20 updates. It is 1 if all gradients are equal, about 0 if they are independent
of each other with mean 0. The first update has nothing to agree with and leaves v as it is.

Not in the paper. The same question is asked of a batch's size in arXiv 1812.06162.
"""
import torch

DECAY = 0.95  # of the two means, an update


def start(optimizer):
    """From now on every step of this torch.optim.AdamW has its rate scaled by the agreement.

    The means are two scalars beside each trained tensor's moments, "dot" and "square".
    """
    optimizer.register_step_pre_hook(scale)


@torch.no_grad()
def scale(optimizer, args, kwargs):
    """Multiply the rate that was set for this update; called by its step()."""
    group, = optimizer.param_groups
    beta1, beta2 = group["betas"]
    dot = 0.0
    square = 0.0
    for p in group["params"]:
        state = optimizer.state[p]
        if "step" not in state:  # the first update
            continue
        updates = state["step"].item()
        q = torch.lerp(p.grad.square(), state["exp_avg_sq"], beta2) / (1 - beta2 ** (updates + 1))
        m = state["exp_avg"] / (q.sqrt() + group["eps"])
        g = p.grad / (q.sqrt() + group["eps"])
        # m began at 0: its mean is this part of the gradients' mean
        part = 1 - beta1 ** updates
        terms = {"dot": part * (g * m).sum(), "square": (m * m).sum()}
        for name, term in terms.items():
            state[name] = torch.lerp(term, state.get(name, torch.zeros_like(term)), DECAY)
        dot += state["dot"].item()
        square += state["square"].item()
    agreement = min(1.0, max(0.0, dot / square)) if square else 0.0
    group["lr"] *= agreement
