"""The device that a program runs on, its memory, the precision of computation, and
torch.compile."""

import contextlib
import ctypes
import math
import os
import sys

import torch

from runtime.files import UserError, error_line, explain_errors

try:
    import resource
except ImportError:  # on Windows
    resource = None

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
M_TRIM_THRESHOLD = -1


def choose_device(name, number=0):
    """Return a torch.device. name: cpu, cuda, mps, or auto; number: which of several GPUs. Raises
    ValueError if the device is not available."""
    if name == "auto":
        name = fastest_device()
    if name == "cuda":
        name = f"cuda:{number}"
    with explain_errors(f"--device={name} cannot be used here", "try --device=cpu"):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # float32 matmuls may use TF32
        else:
            keep_freed_memory()
        if device.type == "cpu":
            limit_memory(memory_of(device))
    return device


def fastest_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def keep_freed_memory():
    """Keep large freed blocks: to return them to Linux and fetch them again page by page takes 8%
    of a training step."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc has it
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def limit_memory(size):
    """Let allocations fail near the size of the memory, in bytes: Linux would kill the process
    without a message. Swap counts as memory."""
    if sys.platform != "linux" or not os.path.exists("/proc/meminfo"):
        return
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("SwapTotal:"):
                size += 1024 * int(line.split()[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(0.95 * size)  # the rest is for other processes
    for other in (soft, hard):
        if other != resource.RLIM_INFINITY:
            limit = min(limit, other)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def check_memory(model, device):
    """Raises ValueError if this machine cannot hold a model: otherwise the system would kill the
    process. model: a GPT on the device "meta", which takes no memory."""
    needs = 0
    for p in model.parameters():
        needs += 2 * p.nbytes + 8 * p.numel()  # weights, gradients, two moments in float32
    have = memory_of(device)
    if needs > have:
        sizes = f"{needs / 2**30:,.1f} GiB with gradients and moments"
        limit = f"but {device} has {have / 2**30:,.1f}"
        way_out = f"train one with less than --mem_keys={model.config.mem_keys} or --n_embd"
        if model.ngram_pool is not None:
            way_out += f", or with less than --ngram_rows={model.config.ngram_rows}"
        raise ValueError(f"the model does not fit: {sizes}, {limit}; {way_out}")


def memory_of(device):
    """Memory of a device in bytes; infinite if unknown."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return total
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def precision(name, device):
    """Return the context to compute in: autocast to bfloat16, or float32 throughout."""
    enabled = name == "bfloat16"
    if name == "auto" and device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def compiled(model, choice, device):
    """The model, or torch.compile of it. choice: true, false, or auto (true on a GPU)"""
    if choice == "auto":
        choice = "false"
        if device.type == "cuda" and os.name == "posix":
            choice = "true"
    if choice == "true":
        return torch.compile(model)
    return model


@contextlib.contextmanager
def explain_compile_errors():
    """If torch.compile or Triton fails inside, for example because there is no C++ compiler, raise
    an error of one line. The model compiles when it is first called."""
    try:
        yield
    except RuntimeError as error:
        if "Failed to find C compiler" in str(error):  # Triton says so
            raise UserError("Triton found no C compiler; install one, such as gcc") from None
        # by name: to import their module would import all of torch.compile
        if type(error).__name__ not in ("InductorError", "BackendCompilerFailed"):
            raise
        way_out = "do without it (--compile=false), or install a C++ compiler, such as g++"
        raise UserError(f"torch.compile failed ({error_line(error)}); {way_out}") from None
