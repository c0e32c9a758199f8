"""What the edge block's kernels need of a Hopper GPU, by compiling them where there is none: registers, spills, memory, instructions.

    python benchmarks/fp8_edge_offline.py [--width 256] [--precision fp8]

Uses the compiler and the disassembler in Triton's package.  Instructions are those of the loop over tiles, for every number of a
tile: an H200 issues 3e13 a second at most (132 multiprocessors, 4 schedulers, 32 lanes, 1.75 GHz), so that one for each number of 1e6
edges of width 256 costs 8.7 us at least.  Bytes spilled go to memory and back in every turn of the loop.
"""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from edge_graph import PRECISIONS
from fp8_edge_kernels import KERNELS, TILES, label
from gpu_timing import print_table

from gnome.fp8.edge_block import Precision, TileSettings

os.environ.pop("TRITON_INTERPRET", None)

ISSUE_RATE = 132 * 4 * 32 * 1.75e9
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")


def jobs(precision: Precision) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Each kernel, the types of its arguments, and the constants that are its own."""
    from gnome.fp8.kernels import edge_backward, edge_forward

    rows = "*fp8e4nv" if precision == "fp8" else "*bf16"
    narrow = {"edges", "projected_senders", "projected_receivers", "new_edges", "grad_edges", "grad_received", "d_edges"}
    stored = {"payload", "hidden", "activation", "weight", "weight_t", "d_out", "d_hidden"}

    def types(kernel: Any, **others: str) -> dict[str, str]:
        found = {}
        for name in kernel.arg_names:
            if name in narrow:
                found[name] = "*bf16"
            elif name in stored:
                found[name] = rows
            elif name in {"senders", "receivers"}:
                found[name] = "*i32"
            elif name in {"n_edges", "eps"}:
                found[name] = "i32" if name == "n_edges" else "fp32"
            elif not name.isupper():
                found[name] = "*fp32"
        return found | others

    forward, backward = edge_forward, edge_backward
    exact = {"APPROXIMATE": True}
    return {
        "hidden, forward": (forward.edge_hidden_kernel, types(forward.edge_hidden_kernel), {"FORWARD": True, **exact}),
        "hidden, backward": (
            forward.edge_hidden_kernel,
            types(forward.edge_hidden_kernel, edges=rows),
            {"FORWARD": False, **exact},
        ),
        "output": (forward.edge_output_kernel, types(forward.edge_output_kernel), {}),
        "norm_gradient": (backward.edge_norm_gradient_kernel, types(backward.edge_norm_gradient_kernel), {}),
        "hidden_gradient": (backward.edge_hidden_gradient_kernel, types(backward.edge_hidden_gradient_kernel), exact),
        "edge_gradient": (backward.edge_gradient_kernel, types(backward.edge_gradient_kernel), {}),
    }


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]) -> Any:
    """Compile for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    own = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    return triton.compile(ASTSource(kernel, signature, own, aligned), target=GPUTarget("cuda", 90, 32), options=options)


def needs(binary: Any, numbers_a_thread: float) -> tuple[int, int, float, float]:
    """Registers a thread, bytes spilled, KB of shared memory, and instructions of the longest loop for every number."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report, listing = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(x) for x in re.findall(r"REG:(\d+) STACK:(\d+)", report)[0])
    found = [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(listing)]
    jumps = [(int(x, 16), at) for at, name, rest in found if name == "BRA" for x in re.findall(r"0x([0-9a-f]+)", rest)]
    first, last = max(((to, at) for to, at in jumps if to < at), key=lambda loop: loop[1] - loop[0])
    return registers, stack, binary.metadata.shared / 1024, sum(first <= at <= last for at, _, _ in found) / numbers_a_thread


def row(width: int, precision: Precision, name: str, tiles: TileSettings) -> tuple[Any, ...]:
    """Compile one kernel with one setting."""
    from gnome.fp8.kernels.edge_launch import launch_options

    kernel, types, own = jobs(precision)[name]
    options = launch_options(tiles, width, precision == "fp8", parts="PARTS" in kernel.arg_names)
    constants = own | {key: value for key, value in options.items() if key.isupper()}
    binary = compiled(kernel, types, constants, {key: value for key, value in options.items() if not key.isupper()})
    registers, stack, shared, count = needs(binary, tiles.block * width / (tiles.warps * 32))
    return (name, label(tiles), registers, stack, shared, count, count * width * 1e9 / ISSUE_RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=256, choices=(128, 256))
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    given = parser.parse_args()
    header = ("kernel", "setting", "registers", "spilled, bytes", "shared, KB", "instructions", "ms at least for 1e6 edges")
    for precision in given.precision:
        print(f"\n{precision}, width {given.width}")
        names = [name for name in jobs(precision) if name.split(",")[0] in KERNELS]
        print_table(header, [row(given.width, precision, name, t) for name in names for t in TILES[given.width, precision]])


if __name__ == "__main__":
    main()
