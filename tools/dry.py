"""A GPU that does not exist, for a dry run: tensors on it have a shape and a device, no values.

    with dry.gpu() as machine:
        model = dry.load(machine, config, torch.bfloat16)  # says that it is on cuda:0
        grpo.generate(model, ...)                    # any code of this project, as it stands
    machine.reads, machine.peak, machine.flops, ...  # what a GPU would have had to do

What the program calls "cuda" is torch's meta device, whose kernels compute shapes only; autograd
works there as everywhere. (Not FakeTensorMode: without a CUDA build of torch its cuda tensors
cannot be indexed by a mask, and a backward pass over them ends the process.) So that a mistake
shows as on a GPU,

  - an operation on tensors of both devices raises Mistake, index tensors included, which a GPU
    would copy in silence; a CPU tensor without dimensions is a number and may be mixed in;
  - what the host learns from the device is counted: .item(), .tolist(), .cpu(), and the operations
    whose result's size depends on values (a boolean mask as an index, nonzero, unique, bincount).
    `uploads` counts copies to the device, which wait for it too, as torch makes them.

Whole numbers and masks are computed for real beside the device (`Machine.values`), so lengths,
positions and the rows that end are those of a real run. Floating point numbers are not: read on the
host they are 1, and whole numbers and masks made from them are 1 and true (token 1; finite).

Counted, not measured. `peak` is bytes of live tensors: what an operation needs inside (workspaces),
what the allocator adds (rounding, fragments) and CUDA's own memory are not in it. `moved` is what
the operations would read and write if none found anything in a cache; `product_bytes` is the part
of matrix products and attention, which no fusion of the others avoids.
"""
import warnings
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import model as transformer
from fast import graph

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
META = torch.device("meta")
KNOWN = 2**22  # numbers in a tensor, at most, whose values are computed
ACROSS = (aten._to_copy, aten.copy_)  # may have one tensor here and one there
SIZED_BY_VALUES = (aten.nonzero, aten._unique2, aten.bincount, aten.masked_select)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
SELECT = (aten.embedding, aten.index, aten.index_select, aten.gather)  # read what they return
EMPTY = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided)


class Mistake(RuntimeError):
    """What a GPU would refuse, or do slowly in silence."""


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


class Machine(TorchDispatchMode):
    """What the device does, operation by operation."""

    def __init__(self, bytes_per_s, flops_per_s):
        super().__init__()
        self.speed = bytes_per_s, flops_per_s
        self.storages = WeakIdKeyDictionary()  # of tensors on the device -> their values, or None
        self.live = 0  # bytes
        self.reset()

    def reset(self):
        """Count anew from here."""
        self.peak = self.live
        self.reads = 0
        self.uploads = 0
        self.operations = 0  # kernels, about: some operations have several
        self.flops = 0
        self.double_flops = 0  # of these, in fp64
        self.moved = 0  # bytes
        self.product_bytes = 0
        self.seconds = 0.0  # one operation after another, each at the card's stated speed

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self.run(op, args, kwargs or {})

    def run(self, op, args, kwargs):
        packet = op.overloadpacket
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if packet in ACROSS:
            out = self.copy(op, args, kwargs)
            if out is not None:
                return out
        here = [x for x in given if x.is_meta]
        elsewhere = [x for x in given if not x.is_meta and x.dim() > 0]
        if here and elsewhere:
            shapes = [f"{'cuda' if x.is_meta else 'cpu'} {tuple(x.shape)}" for x in given]
            raise Mistake(f"{op} has tensors of both devices: {', '.join(shapes)}")
        if not here and kwargs.get("device") != META:
            return op(*args, **kwargs)
        if packet is aten._local_scalar_dense:
            return self.read(args[0]).item()
        if packet in SIZED_BY_VALUES:
            return self.sized_by_values(op, args, kwargs)
        if packet in INDEXED:
            args = [args[0], self.without_masks(args[1]), *args[2:]]
        out = op(*args, **kwargs)
        self.follow(op, args, kwargs, out)
        self.count(op, packet, args, kwargs, given, out)
        return out

    # ---- values

    def values(self, x):
        """The real values of a tensor on the device, sharing memory as it does; None: unknown."""
        if not x.is_meta:
            return x
        flat = self.storages.get(x.untyped_storage())
        if flat is None or flat.dtype != x.dtype:
            return None
        return flat.as_strided(x.shape, x.stride(), x.storage_offset())

    def hold(self, x, values=None):
        """A new tensor of the device: its bytes, and its values if they are whole numbers."""
        storage = x.untyped_storage()
        if storage in self.storages:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        flat = None
        if not x.is_floating_point() and x.numel() <= KNOWN:
            flat = torch.ones(size // x.element_size(), dtype=x.dtype)
        self.storages[storage] = flat
        weakref.finalize(storage, self.let_go, size).atexit = False
        if values is not None and flat is not None:
            self.values(x).copy_(values)

    def let_go(self, size):
        self.live -= size

    def follow(self, op, args, kwargs, out):
        """Keep account of an operation's results; compute them where they are whole numbers."""
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_meta]
        whole = results and not any(x.is_floating_point() for x in results)
        reals = None
        if whole and not op.is_view and max(x.numel() for x in results) <= KNOWN:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if all(self.values(x) is not None for x in inputs):
                reals = self.compute(op, args, kwargs)
        for x, real in zip(results, reals or [None] * len(results)):
            self.hold(x, real)

    def compute(self, op, args, kwargs):
        """The operation on the values (in place where it is): its results, a list."""
        def real(x):
            if isinstance(x, torch.Tensor):
                return self.values(x)
            return torch.device("cpu") if x == META else x
        return tree_leaves(op(*tree_map(real, args), **tree_map(real, kwargs)))

    # ---- between host and device

    def read(self, x):
        """What the host sees of a tensor: the one place where it waits for the device."""
        self.reads += 1
        values = self.values(x)
        return torch.ones(x.shape, dtype=x.dtype) if values is None else values.clone()

    def copy(self, op, args, kwargs):
        """A copy between the devices; None if it is none."""
        source = args[1] if op.overloadpacket is aten.copy_ else args[0]
        if op.overloadpacket is aten.copy_:
            target = args[0].device
        else:
            target = kwargs.get("device") or source.device
        if source.device == target:
            return None
        if target == META:
            self.uploads += source.dim() > 0 or op.overloadpacket is aten._to_copy
            if op.overloadpacket is aten.copy_:
                values = self.values(args[0])
                if values is not None:
                    values.copy_(source)
                return args[0]
            out = op(*args, **kwargs)
            self.hold(out, source.to(out.dtype))
            return out
        real = self.read(source)
        if op.overloadpacket is aten.copy_:
            return op(args[0], real, *args[2:], **kwargs)
        return op(real, *args[1:], **kwargs)

    def sized_by_values(self, op, args, kwargs):
        self.reads += 1
        real = [torch.ones(x.shape, dtype=x.dtype) if self.values(x) is None else self.values(x)
                for x in args[:1]]
        found = op(*real, *args[1:], **kwargs)
        out = tree_map(lambda x: x.to(META), found)
        for x, values in zip(tree_leaves(out), tree_leaves(found)):
            self.hold(x, values)
        return out

    def without_masks(self, indices):
        """Boolean masks as numbers: a GPU asks the host how many are true."""
        numbers = []
        for x in indices:
            if x is None or x.dtype != torch.bool:
                numbers.append(x)
                continue
            places = self.sized_by_values(aten.nonzero.default, [x], {})  # (N, dimensions)
            numbers += [places[:, i] for i in range(x.dim())]
        return numbers

    # ---- counting

    def count(self, op, packet, args, kwargs, given, out):
        if op.is_view or packet in EMPTY:
            return
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        written = sum(map(size_of, results))
        if packet in SELECT:
            moved = 2 * written
        else:
            moved = written + sum(map(size_of, given))
        self.operations += 1
        self.moved += moved
        flops = 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            self.flops += flops
            self.product_bytes += moved
            if results[0].dtype == torch.float64:
                self.double_flops += flops
        bytes_per_s, flops_per_s = self.speed
        self.seconds += max(moved / bytes_per_s, flops / flops_per_s)


def size_of(x):
    """Bytes of memory under a tensor: what is expanded counts once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


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
            mock.patch.object(graph.Graphs, "capture", capture), warnings.catch_warnings():
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
