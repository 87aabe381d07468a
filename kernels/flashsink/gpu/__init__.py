"""The old name of :mod:`flashsink.triton`, for those who import its modules by it."""

import importlib
import pkgutil
import sys

from flashsink import triton

for _module in pkgutil.iter_modules(triton.__path__):
    sys.modules[f"{__name__}.{_module.name}"] = globals()[_module.name] = importlib.import_module(
        f"{triton.__name__}.{_module.name}"
    )
