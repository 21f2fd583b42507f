"""The kernels compile for a GPU where there is none: the interpreter, which the other tests use, takes more than the compiler does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

POINTERS = {
    "rows": "*i64", "segments": "*i32", "amounts": "*fp32", "clock": "*i64", "valid": "*i1", "shrink": "*fp32", "ids": "*i64",
    "left": "*fp32", "moves": "*fp32", "before": "*i64",
}  # fmt: skip


def compile_all() -> None:
    """Each kernel once for Gaussian float16 and once for random signs in bfloat16, in the form that large models take."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from zolightning.kernels import fused

    for dtype, kind, gaussian in (("fp16", tl.float16, True), ("bf16", tl.bfloat16, False)):
        constants: dict[str, Any] = {"GAUSSIAN": gaussian, "SHARED": not gaussian, "TYPE": kind, "ALIGNED": True}
        constants |= {"COPIES": 2, "OCTETS": 256, "PARTS": 4, "RANK": 8}
        types = POINTERS | dict.fromkeys(("out", "weight", "basis"), f"*{dtype}")
        for kernel in (fused._materialise, fused._update, fused._advance, fused._rows, fused._fold):
            own = {name: value for name, value in constants.items() if name in kernel.arg_names}
            signature = {name: "constexpr" if name in own else types.get(name, "i32") for name in kernel.arg_names}
            places = {(kernel.arg_names.index(name),): value for name, value in own.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs={})
            made = triton.compile(
                source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8 if gaussian else 2, "enable_fp_fusion": False}
            )
            assert made.asm["cubin"]
            print(kernel.__name__, dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton comes for Linux")
def test_for_an_h100(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 10


if __name__ == "__main__":
    compile_all()
