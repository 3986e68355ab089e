"""Compile every Triton kernel of the head for GPUs that need not be here: registers, spills, width of the loads.

    PYTHONPATH=.venv/triton python tools/compile_kernels.py [--json FILE] [sm_80 sm_90 sm_100]

Needs Triton (`make .venv/.triton` installs it where only this and the tests find it; a GPU machine's torch brings its
own). Exits with 1 if a kernel spills registers or does not load 128 bits at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from owpo_megatron.head import triton_ops as ops

GPUS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
MAX_REGISTERS = 128
PADDED = {
    "readable",
    "writable",
    "stride",
    "out_stride",
    "h_stride",
    "weight_stride",
    "values_stride",
    "hidden",
}  # multiples of 16


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments and its constants; `whole` are multiples of 16."""

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]


@dataclass(frozen=True)
class Compiled:
    kernel: str
    gpu: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: bool

    @property
    def good(self) -> bool:
        return self.spilled_bytes == 0 and self.wide_loads and self.registers <= MAX_REGISTERS


def cases() -> list[Case]:
    """Every kernel in the forms that a run launches: with and without candidates or entropy, bfloat16 and float32."""
    found = []
    for candidates in (False, True):
        types = dict.fromkeys(("rows", "columns", "readable", "stride", "tiles"), "i32")
        types |= dict(logits="*fp32", column="*i64", out="*fp32", best="*fp32", inverse_temperature="fp32")
        types |= dict(best_column="*i32" if candidates else "*fp32")
        constants = dict(WITH_CANDIDATES=candidates, TILE=ops.TILE, TILES=ops.TILES)
        found.append(Case(f"stats{' with candidates' * candidates}", ops._stats_kernel, types, constants))
    for dtype in ("bf16", "fp32"):
        for entropy in (False, True):
            types = dict.fromkeys(("logits", "lse", "entropy", "dlogp", "dentropy"), "*fp32")
            types |= dict(out=f"*{dtype}", keep="*i64", column="*i64", columns="i32", readable="i32")
            types |= dict(writable="i32", stride="i32", out_stride="i32", inverse_temperature="fp32")
            constants = dict(WITH_ENTROPY=entropy, BLOCK=ops.BLOCK)
            found.append(Case(f"dlogits {dtype}{' entropy' * entropy}", ops._dlogits_kernel, types, constants))
        types = dict(h=f"*{dtype}", weight=f"*{dtype}", column="*i64", out="*fp32", hidden="i32")
        types |= dict(columns_per_row="i32", h_stride="i32", weight_stride="i32")
        found.append(Case(f"gather_dot {dtype}", ops._gather_dot_kernel, types, dict(BLOCK=1024)))
        types = dict.fromkeys(("mean", "error_mean", "variance", "covariance", "error_variance"), "*fp32")
        types |= dict(h=f"*{dtype}", quantised="*fp32", out="*fp32", rows="i32", hidden="i32", h_stride="i32")
        found.append(Case(f"tail {dtype}", ops._tail_kernel, types, dict(BLOCK=ops.TAIL_BLOCK)))
        types = dict(weight=f"*{dtype}", values="*u8", scale="*fp32", out="*fp32", rows="i32", hidden="i32")
        types |= dict(weight_stride="i32", values_stride="i32")
        constants = dict(ROWS=ops.MOMENT_ROWS, BLOCK=ops.MOMENT_BLOCK)
        found.append(Case(f"moments {dtype}", ops._moments_kernel, types, constants))
    return found


def compiled(case: Case, gpu: str) -> Compiled:
    """Compile one kernel for one GPU, and let ptxas count."""
    order = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in order}
    whole = [name for name in order if signature[name].startswith("*") or name in PADDED]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(order.index(name),): value for name, value in case.constants.items()},
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    made = triton.compile(source, target=GPUTarget("cuda", GPUS[gpu], 32))
    ptx = made.asm["ptx"]
    counted = _ptxas(ptx, GPUS[gpu])
    registers = re.search(r"Used (\d+) registers", counted)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", counted)
    assert registers and spills, counted
    wide = re.search(r"ld\.global[\w.:]*\.v(4\.[bf]32|2\.[bf]64)", ptx)
    return Compiled(
        case.name, gpu, int(registers[1]), int(spills[1]) + int(spills[2]), made.metadata.shared, wide is not None
    )


def _ptxas(ptx: str, capability: int) -> str:
    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    names = ("ptxas-blackwell", "ptxas") if capability >= 100 else ("ptxas",)
    program = next(programs / name for name in names if (programs / name).exists())
    target = re.search(r"\.target (\w+)", ptx)
    assert target, "no target in the PTX"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [program, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "gpus", nargs="*", default=list(GPUS), metavar="sm_NN", help="default: all of " + ", ".join(GPUS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    given = parser.parse_args()
    rows = []
    print(f"Triton {triton.__version__}\n\n| kernel | GPU | registers | spilled bytes | shared bytes | 128-bit loads |")
    print("|-|-|-|-|-|-|")
    for case in cases():
        for gpu in given.gpus:
            row = compiled(case, gpu)
            rows.append(row)
            wide = "yes" if row.wide_loads else "NO"
            print(
                f"| {row.kernel} | {gpu} | {row.registers} | {row.spilled_bytes} | {row.shared_bytes} | {wide} |",
                flush=True,
            )
    if given.json:
        given.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}, indent=2)
        )
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
