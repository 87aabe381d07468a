"""``avsr doctor``: what is installed, what runs where, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys

import torch

import flashsink
from avsr.runtime.folders import cache_folder
from avsr.runtime.packages import PACKAGES, install
from flashsink import versions

_NEEDED = (
    *("torch", "triton", "transformers", "peft", "deepspeed", "torchaudio", "jiwer", "safetensors", "omegaconf"),
    *("rich", "soundfile", "av", "pyarrow", "gguf", "matplotlib", "tensorboard", "ninja"),
)
_DEMO = ("espeakng-loader", "scipy")
_PREPARE = ("dlib-bin",)
_WEIGHTS = {pin.partition("==")[0]: package for package, pin in PACKAGES.items()}  # of the demo, and of prepare
_OPTIONAL = ("liger-kernel", "flash-attn", "wandb", "kernels")


def report() -> tuple[list[str], bool]:
    """The lines to print, and whether everything that training needs is installed."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"]
    complete = True
    for title, names, hint in (
        ("needed", _NEEDED, "pip install 'flashsink[avsr]'"),
        ("demo", _DEMO, "pip install 'flashsink[demo]'"),
        ("prepare", _PREPARE, "pip install 'flashsink[prepare]'"),
        ("weights of demo and prepare", tuple(_WEIGHTS), ""),
        ("optional", _OPTIONAL, ""),
    ):
        lines.append(f"{title}:")
        installed = {name: _version(name) for name in names}
        missing = [name for name, version in installed.items() if not version]
        lines += [f"  {name:23s} {versions.outside(name) or installed[name] or 'missing'}" for name in names]
        if packages := [_WEIGHTS[name] for name in missing if name in _WEIGHTS]:
            hint = install(*packages)
        if missing and hint:
            lines.append(f"  -> {hint}")
            complete &= title != "needed"
    lines.append("devices:")
    lines += [f"  {line}" for line in _devices()]
    lines.append("flashsink backends:")
    lines += [f"  {name:10s} {state}" for name, state in flashsink.backends().items()]
    lines.append("tools:")
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
    for tool, why in (
        ("ninja", "for optimizers of DeepSpeed's own (deepspeed.config), which it compiles"),
        ("c++", "a C++ compiler, for the same and for csrc, without which the CPU kernels are plain PyTorch"),
    ):
        found = shutil.which(tool, path=path)
        lines.append(f"  {tool:10s} {'found' if found else f'missing: {why}'}")
    lines.append(f"cache: {cache_folder()}")
    return lines, complete


def _devices() -> list[str]:
    cpu = torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu        {cpu}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}     {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
