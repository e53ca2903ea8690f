"""The device that a program runs on, its memory, and the precision of computation."""

import ctypes
import math
import os
import sys

import torch

from runtime.files import explain_errors

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
M_TRIM_THRESHOLD = -1


def choose_device(name, number=0):
    """A torch.device. name: cpu, cuda, mps, or auto; number: which of several GPUs. Raises
    ValueError for one that is not there."""
    if name == "auto":
        name = fastest_device()
    if name == "cuda":
        name = f"cuda:{number}"
    with explain_errors(f"device={name} cannot be used here", "try device=cpu"):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # what is left in float32 may use TF32
        else:
            keep_freed_memory()
    return device


def fastest_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def keep_freed_memory():
    """Linux gives large freed blocks back, and fetches them again page by page: 8% of a
    training step."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc has it
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


def check_memory(model, device):
    """Raises ValueError if this machine cannot hold a model: the system would just end the
    process. model: a GPT on the device "meta", which takes no room."""
    needs = 0
    for p in model.parameters():
        needs += 2 * p.nbytes + 8 * p.numel()  # weights, gradients, two moments in float32
    have = memory_of(device)
    if needs > have:
        sizes = f"{needs / 2**30:,.1f} GiB with gradients and moments"
        limit = f"{device} has {have / 2**30:,.1f}"
        way_out = f"lower mem_keys={model.config.mem_keys} or n_embd"
        raise ValueError(f"the model does not fit: {sizes}, {limit}; {way_out}")


def memory_of(device):
    """Bytes; infinite where they are not known."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return total
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def precision(name, device):
    """The context to compute in: autocast to bfloat16, or float32 throughout."""
    enabled = name == "bfloat16"
    if name == "auto" and device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def compiled(model, choice, device):
    """The model, or torch.compile of it. choice: true, false, or auto: on a GPU"""
    if choice == "auto":
        choice = "false"
        if device.type == "cuda" and os.name == "posix":
            choice = "true"
    if choice == "true":
        return torch.compile(model)
    return model
