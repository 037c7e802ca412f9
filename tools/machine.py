"""The device of tools/dry.py: what every operation reads, writes and computes, shapes only."""
import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
META = torch.device("meta")
KNOWN = 2**22  # numbers in a tensor, at most, whose values are computed
ACROSS = (aten._to_copy, aten.copy_)  # may have one tensor here and one there
SIZED_BY_VALUES = (aten.nonzero, aten._unique2, aten.bincount, aten.masked_select)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
SELECT = (aten.embedding, aten.index, aten.index_select, aten.gather)  # read what they return
# torch's list has no addmm_, which is an addmm
PRODUCTS = flop_registry | {aten.addmm_: flop_registry[aten.addmm]}
EMPTY = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided)

known_shapes = {}  # an operation and the shapes it was given -> the shapes of its results


class Mistake(RuntimeError):
    """What a GPU would refuse, or do slowly in silence."""


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
        given = tensors_in([*args, *kwargs.values()])
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
            given = tensors_in([*args, *kwargs.values()])
        out = self.shapes(op, args, kwargs)
        results = tensors_in((out,))
        self.follow(op, args, kwargs, given, results)
        self.count(op, packet, args, kwargs, given, results)
        return out

    def shapes(self, op, args, kwargs):
        """The operation's results, without values; remembered, for torch takes up to 1 ms."""
        returned = op._schema.returns
        if op.is_view or torch.Tag.inplace_view in op.tags or not returned:
            return op(*args, **kwargs)
        key = op, layout(args), layout(tuple(kwargs.items()))
        if key not in known_shapes:
            known_shapes[key] = tree_map_only(torch.Tensor, layout, op(*args, **kwargs))
        if len(returned) == 1 and returned[0].alias_info is not None:
            return args[0]  # in place
        out = known_shapes[key]
        return made(out) if type(out) is Layout else tree_map_only(Layout, made, out)

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

    def follow(self, op, args, kwargs, given, results):
        """Keep account of an operation's results; compute them where they are whole numbers."""
        reals = None
        whole = results and not any(x.is_floating_point() or x.numel() > KNOWN for x in results)
        if whole and not op.is_view and all(self.values(x) is not None for x in given):
            reals = self.compute(op, args, kwargs)
        for x, real in zip(results, reals or [None] * len(results)):
            self.hold(x, real)

    def compute(self, op, args, kwargs):
        """The operation on the values (in place where it is): its results, a list."""
        def real(x):
            if isinstance(x, torch.Tensor):
                return self.values(x)
            return torch.device("cpu") if x == META else x
        return tensors_in((op(*tree_map(real, args), **tree_map(real, kwargs)),))

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
        for x, values in zip(tensors_in((out,)), tensors_in((found,))):
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

    def count(self, op, packet, args, kwargs, given, results):
        if op.is_view or packet in EMPTY:
            return
        written = sum(map(size_of, results))
        if packet in SELECT or packet is aten.copy_:
            moved = 2 * written
        else:
            moved = written + sum(map(size_of, given))
        self.operations += 1
        self.moved += moved
        flops = 0
        if packet in PRODUCTS:
            flops = PRODUCTS[packet](*args, **kwargs, out_val=results[0])
            self.flops += flops
            self.product_bytes += moved
            if results[0].dtype == torch.float64:
                self.double_flops += flops
        bytes_per_s, flops_per_s = self.speed
        self.seconds += max(moved / bytes_per_s, flops / flops_per_s)


def tensors_in(nested):
    found = []
    for x in nested:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            found += tensors_in(x)
    return found


@dataclass(frozen=True)
class Layout:
    """All that shapes need to know of a tensor."""
    shape: tuple
    stride: tuple
    dtype: torch.dtype
    device: torch.device


def layout(x):
    """Layouts in the place of tensors, and types beside numbers: 1, 1.0 and True are equal."""
    if isinstance(x, torch.Tensor):
        return Layout(tuple(x.shape), x.stride(), x.dtype, x.device)
    if isinstance(x, (tuple, list)):
        return tuple(map(layout, x))
    return type(x), x


def made(x):
    return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device)


def size_of(x):
    """Bytes of memory under a tensor: what is expanded counts once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
