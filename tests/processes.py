"""Programs in processes of their own, without the seconds that each would take to import torch.

They are forked from a server that has imported it: one for each pytest process.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from pathlib import Path

import train
from helpers import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "sample", "torch._dynamo", "pytest"])


class Process:
    """A function in a process of its own; its output goes to files. As subprocess.Popen.

    environment: more variables; stdout: a path instead of a file"""

    def __init__(self, function, *arguments, environment=None, stdout=None):
        self.folder = tempfile.TemporaryDirectory()
        self.stdout = Path(stdout or f"{self.folder.name}/stdout")
        self.stderr = Path(self.folder.name, "stderr")
        paths = (self.stdout, self.stderr)
        for path in paths:
            path.touch()  # it may be killed before it has begun
        work = (function, arguments, environment or {}, paths)
        self.process = SERVER.Process(target=begin, args=work)
        self.process.daemon = True  # it ends with the tests
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=100):
        """Wait for its end. Returns standard output and standard error."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still at work after {timeout} s: {self.stderr.read_text()}")
        if not self.stdout.is_file():
            return "", self.stderr.read_text(errors="surrogateescape")
        return self.stdout.read_text(errors="surrogateescape"), self.stderr.read_text(
            errors="surrogateescape"
        )


def begin(function, arguments, environment, paths):
    """In the new process."""
    os.chdir(ROOT)
    os.environ.update(environment)
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)


def run_program(path, *arguments):
    """python path arguments"""
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")


def run_train(*arguments):
    """train.py of this process, of which the caller has replaced a part."""
    sys.argv = ["train.py", *map(str, arguments)]
    train.PARENT = os.getppid()  # it was imported in the server
    train.main(sys.argv[1:])


def start_program(path, *arguments, **options):
    return Process(run_program, path, *map(str, arguments), **options)


def start_torchrun(ranks, *arguments):
    """torchrun itself; the ranks are new Python processes that it starts."""
    options = ["--standalone", "--monitor-interval=0.1", f"--nproc_per_node={ranks}"]
    return Process(run_torchrun, [*options, *map(str, arguments)])


def run_torchrun(arguments):
    from torch.distributed.run import main

    main(arguments)


def start_ranks(count, function, *arguments, without=()):
    """The processes that torchrun would start, without torchrun, which ends the others when one
    ends. without: variables of torchrun"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = []
    for rank in range(count):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name in without:
            del environment[name]
        processes.append(Process(function, *arguments, environment=environment))
    return processes
