"""bfloat16 in Triton's interpreter, which holds its 16 bits in numpy's uint16 and would compute on them as integers.

Here operands are widened to float32, which is exact, and results rounded to nearest even.
What only moves values moves their bits. Whatever else takes bfloat16 is refused, so that nothing is silently wrong.
"""

from __future__ import annotations

import functools

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BF16 = tl.bfloat16
ARITHMETIC = ("fadd", "fsub", "fmul", "dot")
COMPARISONS = tuple(f"fcmp{ordered}{relation}" for ordered in "OU" for relation in ("EQ", "NE", "LT", "LE", "GT", "GE"))
CASTS = ("fp_ext", "fp_trunc", "fp_to_si", "fp_to_ui", "si_to_fp", "ui_to_fp")
MEMORY = ("masked_load", "store", "masked_store", "tensor_pointer_store", "descriptor_store", "descriptor_scatter")
SHAPES = ("reshape", "trans", "expand_dims", "broadcast", "cat", "join", "split", "splat", "unsplat", "gather")
COMPUTED = {f"create_{name}" for name in ARITHMETIC + COMPARISONS + CASTS}
MOVED = {f"create_{name}" for name in MEMORY + SHAPES + ("bitcast", "fabs", "select")}


def narrow(values):
    """The bits (uint16) of float32 values: to nearest even, beyond the largest to infinity; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    quiet = bits | np.uint32(0x00400000)
    return (np.where(np.isnan(values), quiet, rounded) >> np.uint32(16)).astype(np.uint16)


def is_bf16(argument):
    """Of a tensor, or of the type that a cast is to."""
    kind = argument.dtype if isinstance(argument, TensorHandle) else argument
    return isinstance(kind, tl.dtype) and kind.scalar == BF16


def widen(argument):
    if not is_bf16(argument):
        return argument
    if isinstance(argument, tl.dtype):
        return tl.float32
    return TensorHandle((argument.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def computed(plain):
    def op(self, *arguments):
        if not any(map(is_bf16, arguments)):
            return plain(self, *arguments)
        found = plain(self, *map(widen, arguments))
        # the last argument is the second operand or a cast's target; comparisons give bool, and dot's is an option
        if not is_bf16(arguments[-1]) or found.data.dtype == bool:
            return found
        return TensorHandle(narrow(found.data), BF16)

    return op


def refused(plain, name):
    def op(self, *arguments, **options):
        if any(map(is_bf16, arguments)):
            raise NotImplementedError(f"{name} of bfloat16 in the interpreter: convert with .to(tl.float32) first")
        return plain(self, *arguments, **options)

    return op


def check_reduced(plain):
    def check(self, tensors):
        if any(is_bf16(x.handle) for x in tensors):
            raise NotImplementedError("reduce or scan of bfloat16: convert with .to(tl.float32) first")
        plain(self, tensors)

    return check


def check_interpreter():
    """Raises RuntimeError where it is not the one that this module was written for."""
    methods = vars(InterpreterBuilder)
    wrong = sorted((COMPUTED | MOVED) - methods.keys()) or [x for x in ("get_bf16",) if x in methods]
    if not wrong:
        one = TensorHandle(np.array([0x3F80], np.uint16), BF16)
        above = TensorHandle(np.array([1.0 + 3 / 512], np.float32), tl.float32)
        sums = {"create_fadd": methods["create_fadd"](InterpreterBuilder(), one, one)}
        sums["create_fp_trunc"] = InterpreterBuilder().create_fp_trunc(above, BF16)
        bits = {"create_fadd": 0x7F00, "create_fp_trunc": 0x3F80}  # added as integers, and cut off
        wrong = [name for name, found in sums.items() if found.data.tolist() != [bits[name]]]
    if wrong:
        raise RuntimeError(
            f"Triton {triton.__version__}'s interpreter differs from 3.6's in {', '.join(wrong)}: "
            f"see whether it computes bfloat16 by itself, and change or delete {__file__}"
        )


@functools.cache  # once
def install():
    """Makes the interpreter of this process compute bfloat16; RuntimeError where it is not as expected."""
    check_interpreter()
    for name, plain in list(vars(InterpreterBuilder).items()):
        if name in COMPUTED:
            setattr(InterpreterBuilder, name, computed(plain))
        elif name.startswith("create_") and name not in MOVED:
            setattr(InterpreterBuilder, name, refused(plain, name))
    InterpreterBuilder.get_bf16 = lambda _, value: TensorHandle(narrow(np.array([value], np.float32)), BF16)
    scans = interpreter.ReduceScanOpInterface
    scans.check_tensor = check_reduced(scans.check_tensor)
