"""Stand-in for TransformerEngine, which needs a GPU: the parameters of its modules, and no forward.

Megatron-Core's own subclasses of these modules name, shard and save the parameters. Every other
name of the package is an empty class.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types

import torch

__version__ = "2.9.0"


class _Permissive(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(name)


def _placeholder(name):
    return _Permissive(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _placeholder(name))
        return self.__dict__[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any submodule exists, and has any name."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith("transformer_engine."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        if module.__name__ == "transformer_engine.pytorch.cpu_offload":
            module.get_cpu_offload_context = lambda *args, **kwargs: (
                contextlib.nullcontext(),
                None,
            )
        for item in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention):
            setattr(module, item.__name__, item)


class _Module(torch.nn.Module):
    """TransformerEngine's modules have a state of their own, which is empty without FP8."""

    def add(self, name, *shape, dtype, device, fill=None):
        data = torch.empty(shape, dtype=dtype, device=device)
        self.register_parameter(
            name, torch.nn.Parameter(data if fill is None else data.fill_(fill))
        )

    fp8 = fp8_calibration = False
    fp8_meta = {"fp8_checkpoint": False}

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass

    def init_fp8_metadata(self, num_gemms=1):
        pass

    def set_tensor_parallel_group(self, group):
        pass


class Linear(_Module):
    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        parallel_mode=None,
        tp_size=1,
        params_dtype=None,
        device=None,
        **_,
    ):
        super().__init__()
        out_features //= tp_size if parallel_mode == "column" else 1
        in_features //= tp_size if parallel_mode == "row" else 1
        self.use_bias = bias
        self.in_features, self.out_features = in_features, out_features
        self.add("weight", out_features, in_features, dtype=params_dtype, device=device)
        if bias:
            self.add("bias", out_features, dtype=params_dtype, device=device)

    def forward(self, *_):  # modelopt tells modules apart by this
        raise NotImplementedError


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, normalization="LayerNorm", **kwargs):
        super().__init__(in_features, out_features, **kwargs)
        kind = {"dtype": kwargs["params_dtype"], "device": kwargs["device"]}
        self.add("layer_norm_weight", in_features, **kind, fill=1)
        if normalization == "LayerNorm":
            self.add("layer_norm_bias", in_features, **kind, fill=0)

    def forward(self, *_):
        raise NotImplementedError


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        bias=True,
        parallel_mode=None,
        tp_size=1,
        params_dtype=None,
        device=None,
        **_,
    ):
        super().__init__()
        out_features //= tp_size if parallel_mode == "column" else 1
        in_features //= tp_size if parallel_mode == "row" else 1
        self.num_gemms, self.use_bias = num_gemms, bias
        for i in range(num_gemms):
            self.add(f"weight{i}", out_features, in_features, dtype=params_dtype, device=device)

    def forward(self, *_):
        raise NotImplementedError


class RMSNorm(_Module):
    def __init__(
        self, normalized_shape=None, params_dtype=None, device=None, hidden_size=None, **_
    ):
        super().__init__()
        self.add(
            "weight", normalized_shape or hidden_size, dtype=params_dtype, device=device, fill=1
        )


class DotProductAttention(_Module):
    def __init__(self, *args, **kwargs):
        super().__init__()


sys.meta_path.append(_Finder())
import transformer_engine.common  # noqa: E402, F401
import transformer_engine.pytorch  # noqa: E402, F401
