"""Python processes that start in milliseconds, for tests that start many.

`Popen` and `run` are subprocess's, for [sys.executable, SCRIPT | -m MODULE | -c CODE, ...].
A server imports the project once and forks itself for each of them. The processes are real: each
has its own pid, memory, files and signals, and is the caller's own child.

What they do not show is an interpreter's start. What is about imports, warnings at import, or
variables that are read before torch is loaded uses subprocess itself; only OMP_NUM_THREADS is
heeded, and is 1 by default. Nor is there an elastic agent: `start_ranks` gives each rank torchrun's
variables.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest import mock

PIPE, STDOUT = subprocess.PIPE, subprocess.STDOUT
ROOT = Path(__file__).parent.parent
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Popen(subprocess.Popen):
    """subprocess.Popen whose child is a fork of the server."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *others
    ):  # fmt: skip
        command = [os.fspath(argument) for argument in args]
        assert command[0] == sys.executable, f"not a command of Python: {command}"
        assert not any((preexec_fn, pass_fds, shell, executable)), "use subprocess for this"
        request = {
            "arguments": command[1:],
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": {
                key: os.fspath(value) for key, value in (os.environ if env is None else env).items()
            },
        }
        own = [0 if p2cread == -1 else p2cread, c2pwrite, errwrite]
        streams = [own[0], *(i + 1 if fd == -1 else fd for i, fd in enumerate(own[1:]))]
        self.pid = _server().fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(
    arguments, *, input=None, capture_output=False, timeout=None, check=False, **options
) -> subprocess.CompletedProcess:
    """subprocess.run by `Popen`."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(arguments, **options) as process:
        try:
            out, error = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
    done = subprocess.CompletedProcess(arguments, process.returncode, out, error)
    if check:
        done.check_returncode()
    return done


def start_ranks(world: int, arguments, *, env=None, **options) -> list[Popen]:
    """A process for each rank, with the variables that torchrun would give it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        Popen(
            arguments,
            env={**(env or os.environ), **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
        )
        for rank in range(world)
    ]


def run_ranks(world: int, arguments, *, timeout: float = 300, **options) -> list[str]:
    """`start_ranks` to their end; what each printed, on stdout and stderr. All must end well."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = start_ranks(world, arguments, **pipes, **options)
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    statuses = [process.returncode for process in processes]
    assert statuses == [0] * world, (statuses, *printed)
    return printed


# The server


class Server:
    """The process that forks. Its children become ours when what lies between has ended."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.lock = threading.Lock()
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        theirs.close()
        atexit.register(self.close)

    def fork(self, request: dict, streams: list[int]) -> int:
        """The pid of a process that does as `request` says, and is a child of this process."""
        data = json.dumps(request).encode()
        with self.lock:
            socket.send_fds(self.ours, [len(data).to_bytes(8, "big")], streams)
            for start in range(0, len(data), 2**16):
                self.ours.send(data[start : start + 2**16])
            answer = self.ours.recv(64)
        assert answer, "the server that forks has ended"
        return int(answer)

    def close(self) -> None:
        self.ours.close()
        self.process.wait()


@functools.cache
def _server() -> Server:
    return Server()


def serve(channel: socket.socket) -> tuple[dict, list[int]] | None:
    """Fork for each request. Returns in the children, and None when nobody is left to ask."""
    while True:
        head, streams, _, _ = socket.recv_fds(channel, 8, 3)
        if not head:
            return None
        size, data = int.from_bytes(head, "big"), b""
        while len(data) < size:
            data += channel.recv(2**16)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                os.close(writing)
                channel.close()
                return json.loads(data), streams
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)  # from here on the pid is a child of whoever asked
        channel.send(os.read(reading, 64))
        for descriptor in (reading, writing, *streams):
            os.close(descriptor)


def become(request: dict, streams: list[int]) -> None:
    """Do what `python ARGUMENTS` does."""
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    # The server's own know whether what they wrote to can seek, and is a terminal
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    error = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.stderr = sys.__stderr__ = error
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    first, *rest = request["arguments"]
    sys.path[0] = request["cwd"]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = ["-m", *rest[1:]]
        sys.modules.pop(rest[0], None)  # else runpy warns that it runs a second time
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        assert not first.startswith("-"), f"use subprocess for python {first}"
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def leave(error: BaseException | None) -> None:
    """End as an interpreter does after `error`, but leave what was imported as it is.

    To tear it down takes a second, and copies the memory that is shared with the server.
    """
    status = 0
    if isinstance(error, SystemExit):
        status = error.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).fflush(None)
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def prepare() -> None:
    """Import what the children will, for good: their collector need not look at it."""
    for path in sorted((ROOT / "ssl_xcit").rglob("*.py")):
        if not path.stem.startswith("__"):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    load_kernels()
    gc.freeze()


def load_kernels() -> None:
    """Have numba read the loader's kernels: a second in each process whose loader is its first."""
    from PIL import Image
    from tqdm import tqdm

    from ssl_xcit.data.batches import DTYPES
    from ssl_xcit.data.loader import EvalLoader, MultiCropLoader
    from ssl_xcit.data.views import EvalView, View
    from ssl_xcit.data.writer import write_beton

    no_monitor = mock.patch.object(tqdm, "monitor_interval", 0)  # which is a thread
    with no_monitor, tempfile.TemporaryDirectory() as folder:
        images, beton = Path(folder) / "images", Path(folder) / "a.beton"
        (images / "a").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(images / "a" / "a.jpg")
        write_beton(images, beton, progress=False)
        for dtype in DTYPES:
            loader = MultiCropLoader(beton, [[View(8, (0.5, 1.0))]], 1, dtype=dtype)
            for each in (loader, EvalLoader(beton, EvalView(8, 8), 1, dtype=dtype)):
                next(iter(each))
            loader.close()
    assert threading.active_count() == 1, "threads do not survive a fork"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, meant for whoever asked
    prepare()
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    ended: BaseException | None = None
    try:
        if asked is not None:
            become(*asked)
    except BaseException as error:
        ended = error
    leave(ended)
