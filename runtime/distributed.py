"""The processes of a run: ranks started by torchrun, signals, and how a process ends."""

import contextlib
import datetime
import io
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from runtime.files import UserError, error_line, explain_errors

WAIT_FOR_RANK_0 = 5  # seconds
RANK_VARIABLES = "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


class Ranks:
    """This process has number `rank` among the `world` processes of a run, and number `local` on
    its machine.

    With memory_parallel=M, ranks 0 to M-1 share one table, ranks M to 2M-1 share a copy of it, and
    so on. `group` is the group of this rank, or None. `replicas` are the ranks that hold the same
    columns.

    timeout: seconds to wait for another process; parent: process id of torchrun. Raises
    ValueError if torchrun's environment variables do not suffice to find the other processes."""

    def __init__(self, timeout, parent):
        self.rank = 0
        self.local = 0
        self.world = 1
        self.M = 1
        self.group = None
        self.replicas = None
        self.timeout = datetime.timedelta(seconds=timeout)
        self.parent = parent
        self.by_torchrun = "RANK" in os.environ
        if self.by_torchrun:
            what = f"processes do not find each other through {RANK_VARIABLES}"
            with explain_errors(what, "start them with torchrun"):
                self.join()

    def join(self):
        if self.torchrun_has_died():
            raise ValueError("torchrun has died")
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
        self.local = int(os.environ["LOCAL_RANK"])
        dist.init_process_group(backend, timeout=self.timeout)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def torchrun_has_died(self):
        """A killed torchrun cannot end its processes, so they stop as on SIGTERM."""
        return self.by_torchrun and os.getppid() != self.parent

    def make_groups(self, M):
        """M ranks share a table; world / M ranks hold the same columns. M divides world."""
        self.M = M
        if M > 1:
            tables = [list(range(i, i + M)) for i in range(0, self.world, M)]
            self.group, _ = dist.new_subgroups_by_enumeration(tables, self.timeout)
        if self.world > M:
            copies = [list(range(i, self.world, M)) for i in range(M)]
            self.replicas, _ = dist.new_subgroups_by_enumeration(copies, self.timeout)

    def gather(self, value):
        """Return a list of every rank's value. value: plain values and tensors"""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self):
        """Wait until every rank is here."""
        self.gather(None)

    def mean(self, number):
        return sum(self.gather(number)) / self.world

    def average_gradients(self, parameters):
        """Replace gradients by their mean over all ranks, the same bits on each."""
        if self.world > 1:
            gradients = [p.grad for p in parameters]
            vector = parameters_to_vector(gradients)
            dist.all_reduce(vector)
            vector_to_parameters(vector.div_(self.world), gradients)

    def check_same_weights(self, model):
        """Raises UserError unless ranks have the same weights, and replicas the same columns of
        the table. Compares sums in float64."""
        if self.world == 1:
            return
        sums = {}
        for name, parameter in model.named_parameters():
            pieces = parameter.detach().split(2**16)  # small copies in float64
            sums[name] = sum(piece.double().sum().item() for piece in pieces)
        # as text, NaN equals NaN
        tables = self.gather(str(sums.pop("pool.values", 0)))
        networks = self.gather(str(sums))
        for rank in range(self.world):
            first_replica = rank % self.M
            if tables[rank] != tables[first_replica] or networks[rank] != networks[0]:
                what = "its weights differ from the others'"
                raise UserError(f"rank {rank} is out of step: {what}")

    def end(self):
        """End a complete run."""
        if self.by_torchrun:
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # a gloo thread that frees a tensor while Python exits would abort it


def processes_per_table(config, model_config):
    if model_config.mem_layers:
        return config.memory_parallel
    return 1


def check_processes(config, model_config, world):
    M = processes_per_table(config, model_config)
    steps = config.gradient_accumulation_steps
    width = model_config.mem_value_dim
    if M > 1 and model_config.system != "memory":
        raise ValueError(f"--memory_parallel={M}: needs --system=memory, not {model_config.system}")
    if M > 1 and not model_config.mem_shared:
        raise ValueError(f"--memory_parallel={M}: needs --mem_shared=true")
    if steps % world != 0:
        must = f"must be divisible by the {world} processes"
        raise ValueError(
            f"--gradient_accumulation_steps={steps} {must}; {same_batch(config, world)}"
        )
    if world % M != 0 or width % M != 0:
        must = f"must divide the {world} processes and the values' width {width}"
        raise ValueError(f"--memory_parallel={M} {must}: give another one (--resume allows it)")


def same_batch(config, world):
    """How to keep the number of sequences in a step with `world` processes."""
    if config.resume:
        return "start as many as before"
    sequences = config.batch_size * config.gradient_accumulation_steps
    steps = math.ceil(config.gradient_accumulation_steps / world) * world
    way_out = f"give --gradient_accumulation_steps={steps}"
    if sequences % steps == 0:
        batch_size = sequences // steps
        evaluated = config.eval_iters * config.batch_size // batch_size
        way_out += f" --batch_size={batch_size} --eval_iters={evaluated}"
        way_out += f" for the same batch of {sequences} sequences, and the same evaluations"
    return way_out


def command_to_resume(config):
    """The command line that continues a run. config: a TrainConfig"""
    words = ["python"]
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    if "RANK" in os.environ:
        words = ["torchrun", "--standalone"]
        if machines != "1":
            host = f"--rdzv_endpoint={os.environ['MASTER_ADDR']}:29400"  # torchrun's default port
            words = ["torchrun", f"--nnodes={machines}", "--rdzv_backend=c10d", host]
        words.append(f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '1')}")
    words += [sys.argv[0], "--resume", f"--out_dir={config.out_dir}"]
    if config.timeout != type(config).timeout:  # the default
        words.append(f"--timeout={config.timeout}")
    return shlex.join(words)


class StopSignal:
    """SIGINT, SIGTERM, or SIGHUP (a closed terminal) ends the run after the current step. `number`
    is then the signal's number, otherwise 0. torchrun passes a signal on, so it can come twice. A
    second Ctrl-C more than a second later ends the process at once."""

    def __init__(self):
        self.number = 0
        self.time = 0.0
        handle_stop(self.receive)

    def receive(self, number, frame):
        if self.number == 0:
            self.number = number
            self.time = time.monotonic()
            if number == signal.SIGINT and rank_from_environment() == "0":
                text = "Stopping after this step or evaluation, with a checkpoint"
                text = f"\n{text}. A second Ctrl-C ends the process at once, without one.\n"
                os.write(2, text.encode())  # print() must not run in a signal handler
        elif number == signal.SIGINT and time.monotonic() - self.time > 1:
            os._exit(130)

    def of_all(self, ranks):
        """Return the signal that any rank has got, the same on all; 0: none."""
        number = self.number
        if ranks.torchrun_has_died():
            number = signal.SIGTERM
        return max(ranks.gather(number))


def handle_stop(handler):
    """Call handler(number, frame) on SIGINT, SIGTERM and SIGHUP, which a closed terminal sends."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(hangup, handler)


def rank_from_environment():
    """The rank, also before this process joins the others. Rank 0 prints for all."""
    return os.environ.get("RANK", "0")


@contextlib.contextmanager
def output_from_rank_0_only():
    """For output that all ranks would print, such as --help or a wrong option."""
    if rank_from_environment() == "0":
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except SystemExit as ended:
        if ended.code != 0:
            wait_for_rank_0()
        raise


def wait_for_rank_0():
    """All ranks may have found the same error. torchrun ends all of them as soon as one ends, so
    this one waits while rank 0 prints the error."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(WAIT_FOR_RANK_0)


def lost_another_process(error):
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return is_gloo or isinstance(error, dist.DistError)


def fail_on_rank(error, hint=""):
    """End this process with one line on standard error and exit code 1. hint: a fix."""
    rank = rank_from_environment()
    message = error_line(error)
    if lost_another_process(error):
        message = f"another process is lost: {message}"
    if rank != "0":
        message = f"rank {rank}: {message}"
        wait_for_rank_0()
    if hint:
        message += f". {hint}"
    program = Path(sys.argv[0]).name
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    exit_at_once(1)


def exit_at_once(status):
    """Exit. With several processes, skip Python's clean-up, which would wait for the others."""
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    os._exit(status)
