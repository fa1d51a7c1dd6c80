"""What Megatron wants to know of a parameter."""

from torch.nn import Parameter


def mark_parameter(parameter: Parameter, **marks: int) -> None:
    """Note `marks` on a parameter: Megatron reads them as attributes that torch's class lacks."""
    for name, value in marks.items():
        setattr(parameter, name, value)
