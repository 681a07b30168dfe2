"""What the chip will execute: every kernel compiled ahead of time, its instructions counted.

Needs no GPU: Triton ships the assembler and the disassembler. Run as a program, in a process whose
Triton compiles (TRITON_INTERPRET unset):

    PYTHONPATH=kernels python -m tests.kernels.sass          a table
    PYTHONPATH=kernels python -m tests.kernels.sass --json   the same, for the tests
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests import ROOT

ARCHITECTURES = (80, 90, 100)
GATED_DTYPES = ("fp32", "bf16", "fp16", "fp32->bf16")


@dataclasses.dataclass
class Count:
    """What was counted in one kernel, compiled for one architecture."""

    kernel: str
    architecture: int
    instructions: float  # an element
    mufu: float  # an element
    registers: int
    stack: int
    local: int  # local loads and stores: spills
    int_to_float: int
    high_products: int
    shared: int  # shared loads and stores: reductions, and elements moved between threads
    wide: tuple[float, float]  # bytes an element reads and writes by 128-bit accesses
    narrow_loads: int
    narrow_stores: int


class Budget(NamedTuple):
    """What one element may cost; the stream is the bytes an element reads and writes."""

    instructions: float
    registers: int
    stream: tuple[int, int]
    mufu: float = 6.0
    narrow_loads: int = 4  # the state's three words, and a scalar gradient
    narrow_stores: int = 0
    # Whether integer conversions and halves of products are forbidden: they are what a naive
    # generator is made of. Elsewhere a division finds the gate of a row, once a thread.
    draws: bool = True

    def over(self, count: Count) -> list[str]:
        """What a kernel exceeds, one line each."""
        limits = [
            ("instructions", count.instructions, self.instructions),
            ("mufu", count.mufu, self.mufu),
            ("registers", count.registers, self.registers),
            ("stack", count.stack, 0),
            ("local", count.local, 0),
            ("narrow loads", count.narrow_loads, self.narrow_loads),
            ("narrow stores", count.narrow_stores, self.narrow_stores),
        ]
        if self.draws:
            limits.append(("int_to_float", count.int_to_float, 0))
            limits.append(("high_products", count.high_products, 0))
        lines = [f"{kind}: {got}; at most {most}" for kind, got, most in limits if got > most]
        for kind, got, all_of_it in zip(("loads", "stores"), count.wide, self.stream, strict=True):
            if got != all_of_it:
                lines.append(f"wide {kind}: {got} B an element by 128 bits; expected {all_of_it}")
        return lines


def _scaled(instructions: float, registers: int, stream: tuple[int, int]) -> Budget:
    """A tile loads a gate for each of its rows, and stores a partial sum."""
    return Budget(instructions, registers, stream, mufu=1, narrow_stores=1, draws=False)


# Instructions an element for which an H200 has time while it moves the 12 bytes of a masked float32
# weight. Above it a kernel is compute-bound.
FLOOR = 93

# The unstructured kernels: the counts found to leave room for latency below their floors of 93, 62,
# 156 and 109. The others: the floor of the bytes they move.
BUDGETS = {
    "gated_weight fp32": Budget(40, 64, (8, 4), narrow_stores=1),
    "gated_weight bf16": Budget(42, 64, (6, 2), narrow_stores=1),
    "gated_weight fp16": Budget(42, 64, (6, 2), narrow_stores=1),
    "gated_weight fp32->bf16": Budget(42, 64, (8, 2), narrow_stores=1),
    "gated_weight_backward fp32": Budget(54, 56, (12, 8)),
    "gated_weight_backward bf16": Budget(60, 56, (8, 6)),
    "gated_weight_backward fp16": Budget(60, 56, (8, 6)),
    "gated_weight_backward fp32->bf16": Budget(60, 56, (10, 8)),
    "hard_concrete": Budget(62, 64, (4, 4), narrow_loads=5, narrow_stores=1),
    "hard_concrete_backward": Budget(93, 64, (8, 4), narrow_loads=6),
    "scaled_weight fp32 row": _scaled(62, 64, (4, 4)),
    "scaled_weight bf16 row": _scaled(31, 64, (2, 2)),
    "scaled_weight bf16 column": _scaled(31, 64, (2, 2)),
    "scaled_weight_backward fp32 row": _scaled(93, 96, (8, 4)),
    "scaled_weight_backward bf16 row": _scaled(46, 96, (4, 2)),
    "scaled_weight_backward bf16 column": _scaled(46, 96, (4, 2)),
}
# What the launchers also launch: sizes that are no multiple of 16, results that nobody uses. These
# have to compile, and not to spill.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "gated_weight bf16, any size": ("gated_weight bf16", {"ALIGNMENT": 1}),
    "gated_weight_backward fp32, any size": ("gated_weight_backward fp32", {"ALIGNMENT": 1}),
    "gated_weight_backward fp32, no dopen": ("gated_weight_backward fp32", {"dopen_ptr": None}),
    "hard_concrete, one segment": ("hard_concrete", {"offset_ptr": None, "ALIGNMENT": 1}),
    "hard_concrete, layers apart": ("hard_concrete", {"TABLE": True}),
    "hard_concrete, no noise": ("hard_concrete", {"NOISE": False, "open_ptr": None}),
    "hard_concrete_backward, no noise": (
        "hard_concrete_backward",
        {"TABLE": True, "NOISE": False, "dopen_ptr": None},
    ),
    "hard_concrete_backward, no dz": ("hard_concrete_backward", {"dz_ptr": None}),
    "hard_concrete_backward, no dopen": ("hard_concrete_backward", {"dopen_ptr": None}),
    "scaled_weight_backward bf16 row, any size": (
        "scaled_weight_backward bf16 row",
        {"ALIGNMENT": 1},
    ),
}
NAIVE = "naive fp32"


class Build(NamedTuple):
    """A kernel with all it needs to be compiled; ``elements`` is what one program does."""

    kernel: Any
    types: dict[str, str]
    constexprs: dict[str, object]
    elements: int
    multiples_of_16: tuple[str, ...] = ()
    """Numbers that are, beside all pointers."""
    warps: int = 4
    stages: int = 3


def builds() -> dict[str, Callable[[], Build]]:
    """Every kernel as the launchers launch it, each built only when called for."""
    made: dict[str, Callable[[], Build]] = {}
    for dtypes in GATED_DTYPES:
        made[f"gated_weight {dtypes}"] = lambda d=dtypes: _gated_weight(d, backward=False)
        made[f"gated_weight_backward {dtypes}"] = lambda d=dtypes: _gated_weight(d, backward=True)
    made["hard_concrete"] = lambda: _hard_concrete(backward=False)
    made["hard_concrete_backward"] = lambda: _hard_concrete(backward=True)
    for dtype, axis in (("fp32", "row"), ("bf16", "row"), ("bf16", "column")):
        made[f"scaled_weight {dtype} {axis}"] = lambda d=dtype, a=axis: _scaled_weight(d, a, False)
        made[f"scaled_weight_backward {dtype} {axis}"] = lambda d=dtype, a=axis: _scaled_weight(
            d, a, True
        )
    for name, (base, changes) in VARIANTS.items():
        made[name] = lambda build=made[base], c=changes: _variant(build(), c)
    made[NAIVE] = _naive
    return made


def _variant(build: Build, changes: dict[str, object]) -> Build:
    """The build with other constants."""
    return build._replace(constexprs={**build.constexprs, **changes})


def _gated_weight(dtypes: str, *, backward: bool) -> Build:
    from l0fast_kernels import gated_weight as module

    weight, _, out = dtypes.partition("->")
    out = out or weight
    block = module.BACKWARD_BLOCK if backward else module.FORWARD_BLOCK
    types = {"weight_ptr": weight, "dweight_ptr": weight, "out_ptr": out, "dout_ptr": out}
    constexprs: dict[str, object] = {
        "BLOCK": block,
        "VECTOR": 4 if (weight, out) == ("fp32", "fp32") else 8,
        "ALIGNMENT": module.ALIGNMENT,
        "FAST": True,
    }
    kernel = module.gated_weight_backward_kernel if backward else module.gated_weight_kernel
    return Build(kernel, types, constexprs, block)


def _hard_concrete(*, backward: bool) -> Build:
    from l0fast_kernels import hard_concrete as module

    constexprs: dict[str, object] = {
        "NOISE": True,
        "TABLE": False,
        "BLOCK": module.BLOCK,
        "TILE": module.TILE,
        "ALIGNMENT": module.ALIGNMENT,
        "FAST": True,
    }
    if backward:
        return Build(module.hard_concrete_backward_kernel, {}, constexprs, module.BLOCK)
    return Build(module.hard_concrete_kernel, {}, constexprs, module.BLOCK)


def _scaled_weight(dtype: str, axis: str, backward: bool) -> Build:
    import torch

    from l0fast_kernels import scaled_weight as module

    names = ("weight_ptr", "dweight_ptr", "out_ptr", "dout_ptr")
    shape = torch.Size((4096, 4096))
    options: dict[str, object] = dict(module.Tiling(shape, 0 if axis == "row" else 1).options)
    kernel = module.scaled_weight_backward_kernel if backward else module.scaled_weight_kernel
    return Build(kernel, dict.fromkeys(names, dtype), options, module.TILE)


def _naive() -> Build:
    from tests.kernels.probe_kernels import naive_kernel

    return Build(naive_kernel, {}, {"BLOCK": 1024}, 1024)


_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);"
)


def count(name: str, build: Build, architecture: int) -> Count:
    """Compile for an architecture, disassemble, and count."""
    lines, usage = assemble(build, architecture)
    instructions = [opcode for opcode, _ in lines]
    by_kind = collections.Counter(opcode.split(".")[0] for opcode in instructions)
    loads = [op for op in instructions if op.startswith("LDG")]
    stores = [op for op in instructions if op.startswith("STG")]
    wide_loads = [op for op in loads if ".128" in op]
    wide_stores = [op for op in stores if ".128" in op]
    per_thread = build.elements / (32 * build.warps)
    return Count(
        kernel=name,
        architecture=architecture,
        instructions=len(instructions) / per_thread,
        mufu=by_kind["MUFU"] / per_thread,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=by_kind["LDL"] + by_kind["STL"],
        int_to_float=by_kind["I2F"] + by_kind["I2FP"],
        high_products=sum(op.startswith("IMAD.HI") and not _is_shift(args) for op, args in lines),
        shared=by_kind["LDS"] + by_kind["STS"],
        wide=(16 * len(wide_loads) / per_thread, 16 * len(wide_stores) / per_thread),
        narrow_loads=len(loads) - len(wide_loads),
        narrow_stores=len(stores) - len(wide_stores),
    )


def assemble(build: Build, architecture: int) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The instructions (opcode, arguments), and the registers and stack that they need."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = build.kernel.arg_names
    signature = {name: _type(name, build) for name in names}
    # What the launcher would find: tensors from PyTorch's allocator begin at multiples of 16.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n][0] == "*" or (n in build.multiples_of_16 and n not in build.constexprs)
    }
    source = ASTSource(build.kernel, signature, constexprs=build.constexprs, attrs=attributes)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = _run(tools / "nvdisasm", "-c", cubin)
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
    found = (_INSTRUCTION.match(line) for line in text.splitlines())
    lines = [(m.group(1), m.group(2)) for m in found if m and m.group(1) != "NOP"]
    if "EXIT" not in dict(lines):
        raise RuntimeError(f"no instruction was recognised in the disassembly:\n{text[:500]}")
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return lines, resources


def _is_shift(arguments: str) -> bool:
    """Whether a product's upper half is that of a power of two: an address, shifted."""
    immediate = re.search(r", 0x([0-9a-f]+)\b", arguments)
    return immediate is not None and int(immediate.group(1), 16).bit_count() == 1


def _type(name: str, build: Build) -> str:
    if name in build.constexprs:
        return "constexpr"
    if name.endswith("_ptr"):
        table = name == "log_alpha_ptr" and build.constexprs.get("TABLE")  # of addresses
        default = "i64" if table or name in ("state_ptr", "offset_ptr") else "fp32"
        return "*" + build.types.get(name, default)
    if name in build.types:
        return build.types[name]
    return "i64" if name in ("n", "rows", "columns", "gates", "seed") else "fp32"


def _run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def counted(program: str, architecture: int) -> list[dict[str, Any]]:
    """What a program of this folder counts of one architecture, in a child whose Triton compiles
    even if this process's interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{program}", "--json", str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Count every kernel on every architecture, or on those that are named, and print."""
    counts = [
        count(name, build(), architecture)
        for architecture in [int(word) for word in sys.argv[1:] if word.isdigit()] or ARCHITECTURES
        for name, build in builds().items()
        if architecture == 90 or (name.startswith(("gated_weight", "naive")) and "," not in name)
    ]
    if "--json" in sys.argv:
        print(json.dumps([dataclasses.asdict(c) for c in counts]))
        return
    print(f"{'kernel':36} sm  instr/el MUFU/el regs  128-bit B/el in, out  narrow ld, st  shared")
    for c in counts:
        print(
            f"{c.kernel:36} {c.architecture:3} {c.instructions:8.2f} {c.mufu:7.2f} {c.registers:4}"
            f"  {c.wide[0]:8.2f} {c.wide[1]:8.2f}    {c.narrow_loads:6} {c.narrow_stores:4}"
            f"  {c.shared:6}  stack {c.stack} local {c.local} I2F {c.int_to_float}"
            f" HI {c.high_products}"
        )


if __name__ == "__main__":
    main()
