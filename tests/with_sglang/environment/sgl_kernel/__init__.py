"""Stands for SGLang's compiled kernels on a CPU: names can be imported, calls fail loudly.

Qwen3's layers take their plain PyTorch paths there and call none of them.
"""

__version__ = "0.0.0"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not compiled for this machine")

    return missing
