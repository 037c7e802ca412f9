"""A GPU that does not exist, for a dry run: tensors on it have a shape and a device, no values.

    with dry.gpu() as machine:
        model = dry.load(machine, config, torch.bfloat16)  # says that it is on cuda:0
        grpo.generate(model, ...)                    # any code of this project, as it stands
    machine.reads, machine.peak, machine.flops, ...  # what a GPU would have had to do

What the program calls "cuda" is torch's meta device, whose kernels compute shapes only; autograd
works there as everywhere. (Not FakeTensorMode: without a CUDA build of torch its cuda tensors
cannot be indexed by a mask, and a backward pass over them ends the process.) So that a mistake
shows as on a GPU,

  - an operation on tensors of both devices raises machine.Mistake, index tensors included, which
    a GPU would copy in silence; a CPU tensor without dimensions is a number and may be mixed in;
  - what the host learns from the device is counted: .item(), .tolist(), .cpu(), and the operations
    whose result's size depends on values (a boolean mask as an index, nonzero, unique, bincount).
    `uploads` counts copies to the device, which wait for it too, as torch makes them.

Whole numbers and masks are computed for real beside the device (`Machine.values`), so lengths,
positions and the rows that end are those of a real run. Floating point numbers are not: read on the
host they are 1, and whole numbers and masks made from them are 1 and true (token 1; finite). The
fast SVD, which asks whether it has converged, takes one round and then the full SVD.

Counted, not measured. `peak` is bytes of live tensors: what an operation needs inside (workspaces),
what the allocator adds (rounding, fragments) and CUDA's own memory are not in it. `moved` is what
the operations would read and write if none found anything in a cache; `product_bytes` is the part
of matrix products and attention, which no fusion of the others avoids.
"""
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

import model as transformer
from fast import graph, lanczos
from tools.machine import META, Machine

aten = torch.ops.aten
CUDA = torch.device("cuda:0")


class Names(TorchFunctionMode):
    """What the program sees: the meta device is called cuda, and attention has a GPU's kernels."""

    def __init__(self, attention):
        super().__init__()
        self.special = {torch.Tensor.device.__get__: device_of,
                        torch.Tensor.is_meta.__get__: lambda x: False,
                        torch.Tensor.is_cuda.__get__: lambda x: x.is_meta,
                        torch.tensor: make_tensor, torch.as_tensor: make_tensor,
                        F.scaled_dot_product_attention: attention}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:  # a name, not a tensor
            return func(*args)
        args = [META if is_cuda(x) else x for x in args]
        kwargs = {name: META if is_cuda(x) else x for name, x in (kwargs or {}).items()}
        return self.special.get(func, func)(*args, **kwargs)


def is_cuda(x):
    return type(x) in (str, torch.device) and str(x).startswith("cuda")


def device_of(x):
    return CUDA if x.is_meta else x.device


def make_tensor(data, dtype=None, device=None):
    """On the CPU first, for its values."""
    return torch.as_tensor(data, dtype=dtype).clone().to(device or "cpu")


def additive(mask, q):
    """torch's own conversion of a boolean mask, which each call makes anew."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def gpu_attention(q, k, v, attn_mask=None, is_causal=False):
    """The kernels that torch takes on an H100: with a mask the memory-efficient one, else flash."""
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if attn_mask is not None:
        bias = additive(attn_mask, q)
        if bias.stride(-2) % 8:  # rows must begin at multiples of 8: a copy
            width = -(-bias.shape[-1] // 8) * 8
            bias = F.pad(bias, (0, width - bias.shape[-1]))[..., :k.shape[-2]]
        attn_mask = bias.expand(*q.shape[:-1], k.shape[-2])
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, keep, 0.0, is_causal)[0]


def cpu_attention(q, k, v, attn_mask=None, is_causal=False):
    """The kernel that torch takes on a CPU, for comparison with a CPU's memory."""
    mask = additive(attn_mask, q)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal,
                                                            attn_mask=mask)[0]


def capture(graphs, size):
    """In the place of Graphs.capture: a "graph" whose replay is the step itself."""
    return SimpleNamespace(replay=lambda: graphs.step(*size))


@contextmanager
def gpu(bytes_per_s=3.35e12, flops_per_s=989e12, attention=gpu_attention):
    """A block in which "cuda" is the device that does not exist -> its Machine.

    The speeds, bytes/s and FLOP/s, are for Machine.seconds. attention: which kernels it has.
    """
    machine = Machine(bytes_per_s, flops_per_s)
    names = Names(attention)

    def backward(*args, **kwargs):
        with names:  # torch calls it with the mode off, and checkpoints run Python code there
            return run_backward(*args, **kwargs)
    run_backward = torch.autograd._engine_run_backward
    # what checkpoints compare before and after; the default compares devices, by either name
    alike = {"default": lambda x: (x.shape, x.dtype)}
    with mock.patch.object(torch.autograd, "_engine_run_backward", backward), \
            mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, alike), \
            mock.patch.object(graph.Graphs, "capture", capture), \
            mock.patch.object(lanczos, "ROUNDS", 1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA is not available")  # checkpoint's
        with machine, names:
            yield machine


def load(machine, config, dtype):
    """model.load without files: a model of this Config on the device. Counting begins after it."""
    def weights(folder, config, shapes, dtype, device):
        return {name: torch.empty(shape, dtype=dtype, device=device)
                for name, shape in shapes.items()}
    with mock.patch.object(transformer, "read_config", lambda folder: config):
        with mock.patch.object(transformer, "read_weights", weights):
            model = transformer.load("", dtype, "cuda")
    machine.reset()  # model.load lays the model out on the meta device first: no memory
    return model
