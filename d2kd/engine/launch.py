"""Starting the processes of a job, and ending it in one line whatever ends it.

Processes of one machine meet on its loopback interface: nothing listens to the network unless
``--dist-url`` names an address. Under ``torchrun`` each process is there already.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessContext

from ..errors import ConfigError, error_line, first_line
from .faults import Stopped, TrainingError, disk_words, stopping_by_signals

AUTO = "auto"
DEFAULT_TIMEOUT = 1800.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Seconds that processes are given to end before they are killed.
_GRACE = 10.0
# "fork" starts faster, but not where CUDA is in use.
START_METHOD = "spawn"


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """``--dist-timeout``, and a ``--dist-url`` that needs no port."""
    parser.set_defaults(dist_url=AUTO)
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for another process or machine; default: half an hour",
    )


class _Job(NamedTuple):
    """What a process of a job must know."""

    main: Callable
    args: argparse.Namespace
    port: int  # of the meeting point that the launcher offers; 0: at --dist-url
    messages: Any  # a queue for one line each: (rank, whether another process is the cause, words)


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Call ``main(args)``, a function of a module or of the program that was started, in each
    process that ``args`` asks for.

    A mistake of the user's, a fault of the training, or a signal ends the program with one line.

    Returns:
        What ``main`` returned, if it ran in this process; else None.
    """
    with ending_in_one_line():
        return start(main, args)


@contextlib.contextmanager
def ending_in_one_line() -> Iterator[None]:
    """End the program in one line of a mistake, a fault of the training, or a signal."""
    try:
        yield
    except (ConfigError, TrainingError) as error:
        sys.exit(error_line(str(error)))
    except OSError as error:
        if not error.filename:
            raise
        sys.exit(error_line(disk_words(error)))
    except Stopped as stop:
        print(error_line(str(stop)), file=sys.stderr, flush=True)
        sys.exit(128 + stop.signal)


def start(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """As :func:`launch`, for a program that goes on: ConfigError, TrainingError and Stopped are
    raised."""
    with stopping_by_signals():
        if under_torchrun():
            return _join_torchrun(main, args)
        _check_counts(args)
        if args.num_gpus * args.num_machines <= 1:
            return main(args)
        return _start_processes(main, args)


def under_torchrun() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def _check_counts(args: argparse.Namespace) -> None:
    if args.num_gpus < 0 or args.num_machines < 1:
        raise ConfigError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: at least 0 and "
            "1 are needed"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank {args.machine_rank} must be from 0 to {args.num_machines - 1}, for "
            f"--num-machines {args.num_machines}"
        )
    if args.num_machines > 1 and args.dist_url == AUTO:
        raise ConfigError(
            "--num-machines needs --dist-url: the address of machine 0, e.g. tcp://10.0.0.1:29500"
        )
    _check_url(args.dist_url)
    if not args.dist_timeout > 0:
        raise ConfigError(f"--dist-timeout {args.dist_timeout}: it must be positive")


def _check_url(url: str) -> None:
    try:
        parts = urlparse(url)
        good = url == AUTO or parts.scheme in ("file", "env")
        good = good or (parts.scheme == "tcp" and parts.hostname and parts.port is not None)
    except ValueError:  # of a port that is no number
        good = False
    if not good:
        raise ConfigError(f"--dist-url {url}: it must be like tcp://10.0.0.1:29500, or {AUTO}")


def _backend(processes: int) -> str:
    """NCCL where each process has a GPU of its own; else gloo, on the CPU."""
    return "nccl" if 0 < processes <= torch.cuda.device_count() else "gloo"


# --- processes that are started here -------------------------------------------------------------


def _start_processes(main: Callable, args: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_meeting_point(args)) if _meets_here(args) else 0
        messages = mp.get_context(START_METHOD).SimpleQueue()
        job = _Job(main, args, port, messages)
        context = mp.start_processes(
            _process, (job,), nprocs=args.num_gpus, join=False, start_method=START_METHOD
        )
        try:
            while not context.join(grace_period=_GRACE):
                pass
        except Stopped:
            _end_processes(context)
            raise
        except mp.ProcessExitedException as error:
            raise TrainingError(_words_for(context, job)) from error


def _meets_here(args: argparse.Namespace) -> bool:
    """Whether all processes are of this machine, and meet where no other can come."""
    return args.num_machines == 1 and (
        args.dist_url == AUTO or urlparse(args.dist_url).hostname in _LOOPBACK
    )


@contextlib.contextmanager
def _meeting_point(args: argparse.Namespace) -> Iterator[int]:
    """A store on the loopback interface, by which processes find each other; its port."""
    wanted = 0 if args.dist_url == AUTO else urlparse(args.dist_url).port or 0
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ConfigError(f"--dist-url {args.dist_url}: {error.strerror}") from error
        listener.listen()
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=_timeout(args),
            master_listen_fd=listener.detach(),
        )
        yield port
        del store


def _timeout(args: argparse.Namespace) -> datetime.timedelta:
    return datetime.timedelta(seconds=args.dist_timeout)


def _process(local_rank: int, job: _Job) -> None:
    """One process of a job that this module started."""
    # The launcher says what there is to say; files are whole at any time.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    rank = job.args.machine_rank * job.args.num_gpus + local_rank
    try:
        _join(local_rank, rank, job)
        job.main(job.args)
    except (ConfigError, TrainingError) as error:
        lost = getattr(error, "is_of_another_process", False)
        job.messages.put((rank, lost, str(error)))
        raise SystemExit(1) from error
    _leave()


def _join(local_rank: int, rank: int, job: _Job) -> None:
    """Become part of the process group; a TrainingError if not all processes came in time."""
    args = job.args
    backend, world_size = _backend(args.num_gpus), args.num_gpus * args.num_machines
    common = {"rank": rank, "world_size": world_size, "timeout": _timeout(args)}
    try:
        if job.port:
            name = "lo0" if sys.platform == "darwin" else "lo"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            store = dist.TCPStore("127.0.0.1", job.port, timeout=_timeout(args))
            dist.init_process_group(backend, store=store, **common)
        else:
            dist.init_process_group(backend, init_method=args.dist_url, **common)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"not all {world_size} processes met at {args.dist_url} within {args.dist_timeout:g} "
            f"seconds (--dist-timeout): start each machine with its --machine-rank and the same "
            f"--dist-url ({first_line(error)})"
        ) from error
    _prepare(local_rank, args.num_gpus, backend)


def _prepare(local_rank: int, processes: int, backend: str) -> None:
    """What Detectron2 wants of a process in a group."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes)
    else:  # Detectron2 0.6
        for machine in range(dist.get_world_size() // processes):
            ranks = list(range(machine * processes, (machine + 1) * processes))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                comm._LOCAL_PROCESS_GROUP = group
    if backend == "nccl":
        torch.cuda.set_device(local_rank)
    comm.synchronize()


def _leave() -> None:
    """Leave the group when all have done their work: one that left earlier would break the
    connections of those that still use them, and may abort."""
    comm.synchronize()
    dist.destroy_process_group()


def _end_processes(context: ProcessContext) -> None:
    for process in context.processes:
        process.terminate()
    for process in context.processes:
        process.join(_GRACE)
        process.kill()


def _words_for(context: ProcessContext, job: _Job) -> str:
    """Why the processes ended, in one line: what one of them said, or which was killed."""
    said = []
    while not job.messages.empty():
        said.append(job.messages.get())
    own = [words for _, lost, words in sorted(said) if not lost]
    if own:
        return own[0]
    # SIGTERM is what the others are ended with.
    codes = [process.exitcode or 0 for process in context.processes]
    for rank, code in enumerate(codes):
        if code < 0 and -code != signal.SIGTERM:
            return (
                f"process {rank} of {len(codes)} was killed by {signal.Signals(-code).name}, often "
                "by the system for lack of memory; --resume goes on from the last checkpoint"
            )
    if said:
        return said[0][2]
    return f"the processes ended with exit codes {codes}; --resume goes on"


# --- processes that torchrun started -------------------------------------------------------------


def _join_torchrun(main: Callable, args: argparse.Namespace) -> Any:
    local_rank, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    backend = _backend(processes)
    try:
        dist.init_process_group(backend, timeout=_timeout(args))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the processes of torchrun did not meet within {args.dist_timeout:g} seconds "
            f"(--dist-timeout): {first_line(error)}"
        ) from error
    _prepare(local_rank, processes, backend)
    result = main(args)
    _leave()
    return result
