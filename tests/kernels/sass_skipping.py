"""What the chip will execute for skipping linear layers, compiled ahead of time (see sass.py).

PYTHONPATH=kernels python -m tests.kernels.sass_skipping          a table
PYTHONPATH=kernels python -m tests.kernels.sass_skipping --json   the same, for the tests
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Callable

from tests.kernels.sass import ARCHITECTURES, Build, assemble

UNITS = {
    "y": ("stride_ak", "stride_bk"),
    "dx": ("stride_ak", "stride_bn"),
    "dweight": ("stride_am", "stride_bn"),
}
"""Product -> the strides that are 1 in it: y = x W^T, dx = dy W, dweight = dy^T x."""
WITHOUT = {
    "y": ("m_count_ptr",),
    "dx": ("m_count_ptr", "bias_ptr", "bias_index_ptr"),
    "dweight": ("k_count_ptr", "bias_ptr", "bias_index_ptr"),
}
"""Product -> what it is not given."""
GATHERING = "gathering bf16"
INTS = {f"{kind}_count_ptr": "i32" for kind in ("m", "n", "k", "row", "column")} | {
    f"{kind}_ptr": "i32"
    for kind in ("bias_index", "row_index", "column_index", "row_place", "column_place", "index")
}


@dataclasses.dataclass
class Work:
    """What was counted in one kernel, compiled for one architecture."""

    kernel: str
    architecture: int
    registers: int
    stack: int
    local: int
    matrix: int
    """Instructions of the matrix units, of the architecture's own kind."""
    copies: int
    """Loads into shared memory past the registers, by 128 bits."""
    narrow_copies: int
    narrow_loads: int
    wide_loads: int
    stores: int
    narrow_stores: int


MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def over(work: Work) -> list[str]:
    """What a product exceeds, one line each.

    Registers have no limit of their own: 255 is the most a thread can name, and two warp groups of
    128 threads that have so many fill the file. What does not fit spills, which is a limit.
    """
    # By itself a program loads three counts, and each thread its columns' bias and their order.
    limits = [
        ("stack", work.stack, 0),
        ("local", work.local, 0),
        ("narrow copies", work.narrow_copies, 0),
        ("narrow loads", work.narrow_loads, 16),
        ("narrow stores", work.narrow_stores, 0),
    ]
    lines = [f"{kind}: {got}; at most {most}" for kind, got, most in limits if got > most]
    for kind, got in (("matrix", work.matrix), ("copies", work.copies), ("stores", work.stores)):
        if not got:
            lines.append(f"{kind}: none")
    return lines


def builds(architecture: int) -> dict[str, Callable[[], Build]]:
    """Every kernel as the launchers launch it on an architecture."""
    made: dict[str, Callable[[], Build]] = {}
    for product in UNITS:
        made[f"{product} bf16"] = lambda p=product: _matmul(p, "bf16", architecture)
        made[f"{product} fp32"] = lambda p=product: _matmul(p, "fp32", architecture)
    if architecture == 90:
        for product in UNITS:
            made[f"{product} fp16"] = lambda p=product: _matmul(p, "fp16", 90)
            made[f"{product} bf16, parts of tiles"] = lambda p=product: _matmul(
                p, "bf16", 90, even=False
            )
            made[f"{product} bf16, any size"] = lambda p=product: _matmul(
                p, "bf16", 90, even=False, aligned=False
            )
    made["pack"] = lambda: _pack({})
    made["pack rows"] = lambda: _pack(
        dict.fromkeys(("z_ptr", "column_index_ptr", "column_count_ptr"))
    )
    made["unpack"] = _unpack
    if architecture == 90:
        made["compaction"] = _compaction
    made[GATHERING] = _gathering
    return made


def _matmul(
    product: str, dtype: str, architecture: int, even: bool = True, aligned: bool = True
) -> Build:
    import torch

    from l0fast_kernels import bounded_matmul as module

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    tile = module.tile(dtypes[dtype], architecture // 10, aligned)
    constexprs: dict[str, object] = {
        "MULTIPLE": 64,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP": module.GROUP,
        "EVEN": even,
        "PRECISION": "ieee",
    }
    constexprs |= dict.fromkeys(WITHOUT[product]) | dict.fromkeys(UNITS[product], 1)
    numbers = ("m", "n", "k", "stride_am", "stride_ak", "stride_bk", "stride_bn")
    types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr", "bias_ptr"), dtype) | INTS
    types |= dict.fromkeys(numbers, "i32")
    return Build(
        module.bounded_matmul_kernel,
        types,
        constexprs,
        tile.m * tile.n,
        numbers if aligned else (),
        tile.warps,
        tile.stages,
    )


def _pack(without: dict[str, None]) -> Build:
    """Under autocast: float32 weights, packed as bfloat16."""
    from l0fast_kernels import packed_weight as module

    constexprs: dict[str, object] = {"MULTIPLE": 64, "ROWS": module.ROWS, "COLUMNS": module.COLUMNS}
    types = {"out_ptr": "bf16", "rows": "i32", "columns": "i32"} | INTS
    elements = module.ROWS * module.COLUMNS
    return Build(module.pack_kernel, types, constexprs | without, elements, ("rows", "columns"))


def _unpack() -> Build:
    from l0fast_kernels import packed_weight as module

    constexprs: dict[str, object] = {
        "ROWS": module.ROWS,
        "COLUMNS": module.COLUMNS,
        "STEPS": module.STEPS,
    }
    types = {"dpacked_ptr": "bf16", "rows": "i32", "columns": "i32"} | INTS
    elements = module.ROWS * module.COLUMNS
    return Build(module.unpack_kernel, types, constexprs, elements, ("rows", "columns"))


def _compaction() -> Build:
    from l0fast_kernels import compaction as module

    types = dict.fromkeys(("index_ptr", "place_ptr", "count_ptr"), "i32") | {"alive_ptr": "i8"}
    return Build(module.compaction_kernel, types, {"BLOCK": module.BLOCK}, module.BLOCK)


def _gathering() -> Build:
    from tests.kernels.probe_kernels import gathering_matmul_kernel

    numbers = ("n", "stride_am", "stride_bk")
    types = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "bf16") | INTS
    types |= dict.fromkeys(numbers, "i32")
    constexprs: dict[str, object] = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    return Build(gathering_matmul_kernel, types, constexprs, 128 * 128, numbers, 8)


def count(name: str, build: Build, architecture: int) -> Work:
    """Compile for an architecture, disassemble, and count."""
    lines, usage = assemble(build, architecture)
    opcodes = [opcode for opcode, _ in lines]
    kinds = collections.Counter(opcode.split(".")[0] for opcode in opcodes)
    wide = collections.Counter(opcode.split(".")[0] for opcode in opcodes if ".128" in opcode)
    return Work(
        kernel=name,
        architecture=architecture,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=kinds["LDL"] + kinds["STL"],
        matrix=kinds[MATRIX[architecture]],
        copies=wide["LDGSTS"],
        narrow_copies=kinds["LDGSTS"] - wide["LDGSTS"],
        narrow_loads=kinds["LDG"] - wide["LDG"],
        wide_loads=wide["LDG"],
        stores=wide["STG"],
        narrow_stores=kinds["STG"] - wide["STG"],
    )


def main() -> None:
    """Count every kernel on every architecture, or on those that are named, and print."""
    counts = [
        count(name, build(), architecture)
        for architecture in [int(word) for word in sys.argv[1:] if word.isdigit()] or ARCHITECTURES
        for name, build in builds(architecture).items()
    ]
    if "--json" in sys.argv:
        print(json.dumps([dataclasses.asdict(one) for one in counts]))
        return
    for one in counts:
        values = dataclasses.asdict(one)
        print(f"{values.pop('kernel'):32}", *(f"{key} {value}" for key, value in values.items()))


if __name__ == "__main__":
    main()
