"""What a room's door exports says what it is: every public class, function and method."""

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import iwopd_megatron
from iwopd_megatron.errors import UserError

PACKAGES = [
    module.name
    for module in pkgutil.walk_packages(iwopd_megatron.__path__, "iwopd_megatron.")
    if module.ispkg
]


def doors(package: str) -> list[str]:
    room = importlib.import_module(package)
    found = {module.name for module in pkgutil.iter_modules(room.__path__)}
    return [f"{package}.{name}" for name in getattr(room, "__all__", []) if name in found]


def undocumented(module: ModuleType) -> list[str]:
    missing = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            # a dataclass without a docstring is given its signature
            if not value.__doc__ or value.__doc__.startswith(f"{name}("):
                missing.append(name)
            for method, function in vars(value).items():
                is_public = inspect.isfunction(function) and not method.startswith("_")
                if is_public and not inspect.getdoc(getattr(value, method)):
                    missing.append(f"{name}.{method}")
        elif inspect.isfunction(value) and not value.__doc__:
            missing.append(name)
    return missing


@pytest.mark.parametrize("door", [door for package in PACKAGES for door in doors(package)])
def test_what_a_door_exports_is_described(door):
    try:
        module = importlib.import_module(door)
    except UserError as error:  # launch.nemo, in an environment without NeMo-Run
        pytest.skip(str(error))
    assert undocumented(module) == []
