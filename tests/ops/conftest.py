"""Triton's interpreter made right where it is silently wrong: bfloat16 and TensorFloat-32."""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True, scope="session")
def right_interpreter():
    """Products of bfloat16 multiply its bits as integers, and casts to it truncate.

    Those of TensorFloat-32 multiply all of float32, of which tensor cores ignore the low 13 bits.
    """
    if not INTERPRETED:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original_dot, original_cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar == tl.float32:
            return (handle.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def rounded(x):
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)

    def create_dot(self, a, b, d, precision, *rest):
        tf32 = a.dtype.scalar == tl.float32 and str(precision).endswith("TF32")
        if not tf32 and tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return original_dot(self, a, b, d, precision, *rest)
        product = np.matmul(widened(a), widened(b), dtype=np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, source, target):
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(rounded(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widened(source), tl.float32)
        return original_cast(self, source, target)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(builder, "cast_impl", cast_impl)
        for name in ("create_fp_trunc", "create_fp_ext"):
            patch.setattr(builder, name, lambda self, s, t: self.cast_impl(s, t))
        yield


@pytest.fixture(autouse=True)
def runtime_loop_bounds(monkeypatch):
    """Triton 3.5 and 3.6 make ints of loop bounds, arrays of one element, as NumPy 2.4 forbids."""
    if not INTERPRETED:
        return
    import numpy as np
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        original(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr  # Triton 3.5 has no scope
        set_attribute(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
