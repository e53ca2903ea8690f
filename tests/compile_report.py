"""python tests/compile_report.py CAPABILITY WIDTH: compile both kernels for a GPU that need not be there (80 is an A100, 90 an
H100 or H200) and print, for each, its name, bytes spilled, and how many loads from memory are of 16 bytes and of 2 or 4."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kernels


def compile_kernel(kernel, capability, warps, pointers, constants):
    """-> PTX. pointers: {name: type}; all begin at a multiple of 16 bytes, as PyTorch's tensors do."""
    signature = pointers | {"k": "i32"} | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]


def spilled_bytes(ptx, capability):
    """What NVIDIA's assembler reports: bytes stored to and loaded from memory for want of registers."""
    architecture = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", path, "-o", f"{folder}/kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()))


def main(capability, D):
    block_k, block_d, warps = kernels.forward_tile(D)
    forward = compile_kernel(
        kernels.forward_kernel,
        capability,
        warps,
        {"values": "*bf16", "indices": "*i64", "weights": "*fp32", "out": "*bf16"},
        {"D": D, "BLOCK_K": block_k, "BLOCK_D": block_d},
    )
    inputs = {"values": "*bf16", "weights": "*fp32", "grad": "*bf16", "order": "*i64", "rows": "*i64", "starts": "*i64"}
    outputs = {"grad_rows": "*bf16", "grad_weights": "*fp32"}
    block_d, warps = kernels.backward_tile(D)
    constants = {"D": D, "BLOCK_D": block_d}
    backward = compile_kernel(kernels.backward_kernel, capability, warps, inputs | outputs, constants)
    for name, ptx in (("forward", forward), ("backward", backward)):
        wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx))
        narrow = len(re.findall(r"ld\.global[.\w:]*\.(?:v2\.)?b16\b", ptx)) + len(re.findall(r"ld\.global[.\w:]*\.v2\.b16", ptx))
        print(name, spilled_bytes(ptx, capability), wide, narrow)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
