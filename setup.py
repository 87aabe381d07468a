"""Metadata lives in pyproject.toml; here only the C++ library of csrc, which setuptools must be told about.

The library is plain C behind ctypes, no Python extension module: it needs neither torch nor Python's headers, is
named _native.so on every platform, and lies beside flashsink's modules. Without a compiler the installation goes on
without it; FLASHSINK_REQUIRE_NATIVE=1 makes that an error.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("FLASHSINK_REQUIRE_NATIVE", "0") == "1"
NAME = "flashsink._native"
# signals of floating point errors are nobody's business here, and watching for them prevents vectors
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
if platform.machine() in ("x86_64", "AMD64"):
    # GCC 12 passes vectors of 8 bytes through MMX registers and does not clear their state: the next x87 operation of
    # the process (long double, as in NumPy's FFT) then gives NaN
    FLAGS.append("-mno-mmx")
OPENMP = "-fopenmp"


class BuildLibrary(build_ext):
    """Builds a shared library that is no Python module, with OpenMP where the compiler has it."""

    def get_ext_filename(self, fullname: str) -> str:
        if not fullname.endswith("_native"):
            return super().get_ext_filename(fullname)
        return os.path.join(*fullname.split(".")[:-1], "_native.so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        # what an earlier build left must not stand in for one that fails
        folders = [os.path.join(self.build_lib, "flashsink")]
        if self.inplace:
            folders.append(self.get_finalized_command("build_py").get_package_dir("flashsink"))
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, "_native.so"))
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile(ext)
        except Exception as error:  # setuptools has no common class for the ways in which a compiler can be missing
            if REQUIRED:
                raise
            self.warn(f"flashsink is installed without its C++ library, the reference takes over: {error}")

    def _compile(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self.warn(f"trying again without OpenMP, on one thread: {error}")
            ext.extra_compile_args = [flag for flag in ext.extra_compile_args if flag != OPENMP]
            ext.extra_link_args = []
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            NAME,
            sources=[
                f"csrc/{name}.cpp"
                for name in ("activations", "backward", "decorrelation", "forward", "library", "norm")
            ],
            depends=sorted(glob.glob("csrc/*.h")),
            extra_compile_args=[*FLAGS, OPENMP],
            extra_link_args=[OPENMP],
            language="c++",
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
