"""python tests/compile_report.py CAPABILITY WIDTH [bf16] [fp32]: compile the kernels for a GPU that need not be there (80 is an
A100, 90 an H100 or H200) and print, for each: name, type of the values, registers a thread, bytes spilled, how many loads from
memory are of 16 bytes, and how many of 2."""

import inspect
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


def compile_kernel(kernel, capability, warps, constants, **arguments):
    """-> PTX. arguments: {name: type}; pointers begin at a multiple of 16 bytes, as PyTorch's tensors do."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = triton.compiler.ASTSource(
        kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    ).asm["ptx"]


def resources(ptx, capability):
    """What NVIDIA's assembler reports: registers a thread; bytes stored to and loaded from memory for want of registers."""
    architecture = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        ptxas = get_ptxas(
            *[capability][: len(inspect.signature(get_ptxas).parameters)]
        )  # triton 3.5 has one for all
        command = [
            ptxas.path,
            "-v",
            f"--gpu-name={architecture}",
            path,
            "-o",
            f"{folder}/kernel.cubin",
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    return int(re.search(r"Used (\d+) registers", report).group(1)), sum(map(int, spilled))


def compile_all(capability, D, e):
    """(name, PTX) of each kernel for values of type e (bf16 or fp32), width D."""
    value, pair = "*" + e, dict(order="*i64", rows="*i64", targets="*i64")
    block_k, block_d, warps = kernels.forward_tile(D)
    constants = dict(k=128, D=D, BLOCK_K=block_k, BLOCK_D=block_d)
    inputs = dict(values=value, indices="*i64", weights="*fp32", out=value)
    yield "forward", compile_kernel(kernels.forward_kernel, capability, warps, constants, **inputs)

    block_p, block_d, warps = kernels.backward_tile(D)
    constants = dict(k=128, D=D, BLOCK_P=block_p, BLOCK_D=block_d)
    inputs = dict(
        values=value,
        weights="*fp32",
        grad=value,
        begins="*i64",
        ends="*i64",
        out=value,
        grad_weights="*fp32",
    )
    yield (
        "backward",
        compile_kernel(kernels.backward_kernel, capability, warps, constants, **inputs, **pair),
    )

    inputs |= dict(out="*fp32")  # pieces of a long row
    yield (
        "pieces",
        compile_kernel(kernels.backward_kernel, capability, warps, constants, **inputs, **pair),
    )

    block_p, block_d, warps = kernels.sum_tile(D)
    constants = dict(D=D, BLOCK_P=block_p, BLOCK_D=block_d)
    inputs = dict(partial="*fp32", firsts="*i64", out=value)
    yield "sum", compile_kernel(kernels.sum_kernel, capability, warps, constants, **inputs, **pair)

    constants = dict(D=D, BLOCK_D=triton.next_power_of_2(D))
    inputs = dict(values=value, means="*fp32", squares="*fp32", grads=value, bits="*i16")
    inputs |= dict.fromkeys(("rate", "beta1", "beta2", "eps"), "fp32")
    yield (
        "adam",
        compile_kernel(
            kernels.adam_kernel, capability, kernels.adam_warps(D), constants, **inputs, **pair
        ),
    )

    for N, K in ((128, 16), (1024, 32)):
        block_n, block_k, group, warps = kernels.select_tile(N, K)
        P = sum(K // (a + 1) for a in range(K))
        blocks = dict(
            BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_C=triton.next_power_of_2(P), GROUP=group
        )
        inputs = dict(scores=value, candidates="*i64", pairs="*i64", n="i32")
        yield (
            f"select-{N}",
            compile_kernel(
                kernels.select_kernel,
                capability,
                warps,
                dict(N=N, H=4, K=K, COUNT=P, **blocks),
                **inputs,
            ),
        )


def main(capability, D, types):
    for e in types:
        for name, ptx in compile_all(capability, D, e):
            wide = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx))
            narrow = len(re.findall(r"ld\.global[.\w:]*\.b16\b", ptx))
            print(f"{name:24} {e}", *resources(ptx, capability), wide, narrow, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or ("bf16", "fp32"))
