"""The fast engine: what model.py, tinylora.py and grpo.py compute, sooner, on the same model.

    forward.py    the model's forward pass over real tokens only
    passes.py     over prompts and over responses, attention in them
    cache.py      keys and values while sampling, shared by the rows of a group
    head.py       log-probs of tokens from the last states, and draws
    sampling.py   generate        training.py   logprobs, accumulate
    packed.py     weights laid out once per rollout, on a CPU
    lanczos.py    the truncated SVD              graph.py      --cuda-graph

It adds nothing to the model and changes nothing in it. train.py uses this module as the `engine`
unless --engine plain is given, and calls check first.
"""
import torch
import torch.nn as nn

import grpo
import model as plain_model
from fast.forward import Held, project_one
from fast.graph import use_graphs
from fast.lanczos import svd
from fast.sampling import generate
from fast.training import accumulate, logprobs
from support.errors import InputError
from support.params import with_values
from tinylora import TARGETS, TinyLoRALinear

TOKENS = 6  # a response of the check
# of the differences between log-probs. In bf16 it is 0.001 on the toy and 0.04 on a random model of
# SmolLM2's shape; other mathematics make it 1 and more.
MEAN_IN_16_BITS = 0.2
OF_A_LAYER = 0.02  # of a layer's output: in bf16 it is at most 0.0053 on SmolLM2
DIFFERENT = ("the fast engine computes other numbers than model.py, tinylora.py and grpo.py; if "
             "you changed them, run with --engine plain")


def nonzero_adapters(model, sd):
    """Inside the block the trained numbers of all adapters are about `sd` off where they are."""
    params = [p for p in model.parameters() if p.requires_grad] if adapted(model) else []
    random = torch.Generator().manual_seed(0)
    values = [p.detach() + sd * torch.randn(p.shape, generator=random).to(p) for p in params]
    return with_values(params, values)


def adapted(model):
    """The modules that stand in the places of the blocks' linears and are no plain linears."""
    linears = [layer.get_submodule(target) for layer in model.layers for target in TARGETS]
    return [module for module in linears if type(module) is not nn.Linear]


def check_types(model):
    """InputError if a module that this engine replaces by its own code is of another type."""
    pairs = [(model, plain_model.Transformer), (model.embed_tokens, nn.Embedding)]
    for layer in model.layers:
        pairs += [(layer, plain_model.Block), (layer.self_attn, plain_model.Attention),
                  (layer.mlp, plain_model.MLP)]
    pairs += [(m.base, nn.Linear) for m in adapted(model) if type(m) is TinyLoRALinear]
    for module, known in pairs:
        if type(module) is not known:
            raise InputError(f"the fast engine does not know {type(module).__name__} in the place "
                             f"of {known.__name__}; run with --engine plain")


@torch.no_grad()
def check_layers(model):
    """InputError unless sampling and training apply a TinyLoRALinear as tinylora.py does.

    In bf16 the log-probs alone would not tell: v is small and rounding is not. Here v is large, and
    the input is the layer's own right singular vectors, so that its part is as large as W's.
    """
    with nonzero_adapters(model, 1.0):
        held = Held(model)
        for module in held.RSUt:
            x = module.Vt  # (r, d_in)
            plain = module(x).float()  # (r, d_out)
            size = max(plain.norm(), (plain - module.base(x)).norm())
            for quick in (project_one(module, x), held.project_one(module, x)):
                if not (quick - plain).norm() <= OF_A_LAYER * size:
                    raise InputError(DIFFERENT)


def check(model, prompts, stop_ids):
    """InputError unless both engines give the same log-probs of a few tokens after these prompts.

    Whoever changes the mathematics in the plain files must not train something else unawares.
    """
    check_types(model)
    check_layers(model)
    prompts = [list(prompt)[-64:] for prompt in prompts[:3]]  # a suffix will do
    noise = grpo.uniforms([[7, 0, row, 0] for row in range(2 * len(prompts))], TOKENS)
    with torch.no_grad(), nonzero_adapters(model, 0.01):
        args = model, prompts, 2, TOKENS, stop_ids, 0.8, noise
        quick = generate(*args)
        plain = grpo.generate(*args)
        want = grpo.logprobs(model, quick)  # (B, T), 0 where masked
        ours = logprobs(model, quick)
    exact = model.embed_tokens.weight.dtype in (torch.float32, torch.float64)
    differences = torch.stack((quick.logp - want, ours - want)).abs()
    if exact:  # rounding turns no draw, and 1e-3 is far more than it moves a log-prob by
        texts = [x.ids[x.mask].tolist() for x in (quick, plain)]
        same = texts[0] == texts[1] and differences.max() < 1e-3
    else:
        same = differences.sum() / (2 * quick.mask.sum()) < MEAN_IN_16_BITS
    if not same:
        raise InputError(DIFFERENT)
