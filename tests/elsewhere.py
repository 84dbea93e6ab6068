"""A device that is not there: tensors that lie in memory as all others do, but say that they are elsewhere.

What mixes them with tensors of the processor fails, as it would on a graphics card. So all code that is meant for such a card
can be run without one, and what forgot to take its tensors along is found."""
import sys
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device('lazy', 0)    # a kind of device that PyTorch knows by name, and for which it does nothing by itself
MAY_MIX = {'index', 'index_put', 'index_put_', 'copy_', '_index_put_impl_'}  # a card takes indices and copies from the processor


class There(torch.Tensor):
    "A tensor elsewhere"
    @staticmethod
    def __new__(cls, here):
        with torch.inference_mode(False):       # or a view of weights could not be told from them
            return torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE,
                                                       storage_offset=here.storage_offset(), requires_grad=here.requires_grad)

    def __init__(self, here): self.here = here
    def untyped_storage(self): return self.here.untyped_storage()
    def __repr__(self): return f'There({self.here})'
    def __tensor_flatten__(self): return ['here'], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride): return There(inner['here'])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})


def run(func, args, kwargs):
    name, kwargs = func._schema.name.split('::')[1], dict(kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [isinstance(x, There) for x in tensors]
    if any(there) and name not in MAY_MIX and name not in ('_to_copy', 'to', 'set_'):
        for x, away in zip(tensors, there):
            if not away and x.dim(): raise RuntimeError(f'{name}: one tensor is elsewhere, and one of shape {tuple(x.shape)} is not')
    to = next((x for x in (*args, kwargs.get('device')) if isinstance(x, torch.device)), None)
    args = tuple(torch.device('cpu') if isinstance(x, torch.device) else x for x in args)
    if kwargs.get('device') is not None: kwargs['device'] = torch.device('cpu')
    unwrap = lambda x: x.here if isinstance(x, There) else x
    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    goes = to.type == DEVICE.type if to is not None else any(there[:1] if name == 'copy_' else there)
    if not goes: return out
    out = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if any(there) and to is None else out


class Generator(torch.Generator):
    "Random numbers for any device"
    def __new__(cls, device='cpu'): return super().__new__(cls)


class Elsewhere(TorchDispatchMode):
    "Counts what is computed elsewhere; and takes care of new tensors"
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = run(func, args, kwargs or {})
        self.count += isinstance(out, There)
        return out


class Functions(TorchFunctionMode):
    "What PyTorch does before it looks at which kind of tensor it has been given"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], There): return args[0].cpu().tolist()
        if func is torch.Tensor.numpy and isinstance(args[0], There): raise TypeError('a tensor elsewhere has no numbers here')
        if func is torch.Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(args[1], **{'dtype': args[0].dtype, **kwargs, 'device': args[0].device})
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], There):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)                                   # lists become tensors
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get('device') is not None:
            to = kwargs.pop('device')
            return func(*args, **kwargs).to(to)
        return func(*args, **kwargs)


@contextmanager
def elsewhere():
    "Within `with`, 'lazy' is a device like any other. Gives what counts the tensors that came about there"
    modules = [m for name, m in sys.modules.items() if name.startswith('multimodal.')]
    with pytest.MonkeyPatch.context() as patch, Functions(), Elsewhere() as used:
        for module in modules:
            if hasattr(module, 'get_device'): patch.setattr(module, 'get_device', lambda name=None: torch.device(name or DEVICE))
            if hasattr(module, 'ahead'): patch.setattr(module, 'ahead', lambda do, parts: map(do, parts))   # threads know of no mode
        patch.setattr(torch, 'Generator', Generator)
        yield used
