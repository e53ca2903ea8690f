"""Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before Triton is imported."""

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import kernels
from helpers import SMALL, prepare, train_here

kernels.DEBUG = True  # slots out of range are errors, on a GPU, too
os.environ["OMP_NUM_THREADS"] = (
    "1"  # two tests run at a time; and the same sums in the same order, on any machine
)
torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # which a shell without job control takes away


@pytest.fixture(scope="session")
def gpt2():
    """For tests that need GPT-2's vocabulary, which is no part of the repository and may be out of reach."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip(
            "needs GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to the folder where tiktoken keeps it"
        )


@pytest.fixture(scope="session")
def wikitext():
    """The files of wikitext-2's validation and test part."""
    if "WIKITEXT_DIR" not in os.environ:
        pytest.skip(
            "needs real text: set WIKITEXT_DIR to a folder with wikitext2-valid.txt and wikitext2-test.txt"
        )
    return [
        Path(os.environ["WIKITEXT_DIR"]) / f"wikitext2-{part}.txt" for part in ("valid", "test")
    ]


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "facts"
    done = prepare("--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def finished(facts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train_here(*SMALL, f"--dataset={facts}", f"--out_dir={out}")
    return out
