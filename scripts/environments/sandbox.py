"""Runs Python that nobody has read, where the kernel lets it do nothing but compute.

A *keeper* is a small interpreter without secrets: an empty environment, `/` as its
folder, the standard library alone. For each program it forks a *cell*, which closes
every file but the pipe it answers on, takes its limits and installs a seccomp filter.
The filter is a list of the system calls that are allowed: memory, clocks, randomness,
`write` and `exit`. There is no `open`, socket, fork, exec, signal or thread in it, nor
a way to change the filter, the limits or the timers. No root or tool is needed.

What holds, whatever a cell executes, machine code included:

- It reads no file and no other process, writes to its pipe alone, reaches no network.
- It ends at its limit of CPU seconds or, asleep, of twice as many on the clock: by
  timers of the kernel, and by the parent if these should fail. It dies with its keeper.
- It takes no more memory than its limit; the parent reads no more than MOST_BYTES.

What a cell answers is *its* word: it may write any value for any step. So a verdict
must not be computed in it, and what it must not know must not be put into it; the
environment `code` compares in another cell, where none of the program's code runs.
Not kept from a cell: the time, the kernel's bugs in the calls allowed, the processor's.
"""

from __future__ import annotations

import collections
import decimal
import errno
import fractions
import importlib
import io
import json
import math
import os
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from scripts.lib.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    *("abc", "array", "base64", "binascii", "bisect", "calendar", "cmath"),
    *("collections", "contextlib", "copy", "dataclasses", "datetime", "decimal"),
    *("difflib", "enum", "fractions", "functools", "hashlib", "heapq", "inspect"),
    *("io", "itertools", "json", "math", "numbers", "operator", "os", "pprint"),
    *("random", "re", "statistics", "string", "struct", "sys", "textwrap", "time"),
    *("traceback", "types", "typing", "unicodedata", "weakref", "zlib"),
)
"""What programs can import: it is loaded before the filter, nothing is after it."""
UNASKED = (
    *("_strptime", "encodings.ascii", "encodings.cp1252", "encodings.idna"),
    *("encodings.latin_1", "encodings.utf_16", "encodings.utf_16_be"),
    *("encodings.utf_16_le", "encodings.utf_32"),
)
"""What these modules load only once they are used."""
HIDDEN = ("ctypes", "_ctypes", "scripts")

MOST_BYTES = 1 << 20
"""A cell's answer may be so long, values and output together."""
OUTPUT_BYTES = 10_000
START_SECONDS = 60.0
GRACE_SECONDS = 5.0

# by architecture: its AUDIT_ARCH, and the numbers of the calls allowed. madvise is left
# out since root can have memory failed with it, mprotect since only code needs it
X86_64, AARCH64 = "x86_64", "aarch64"
ARCHITECTURES = {X86_64: 0xC000003E, AARCH64: 0xC00000B7}
CALLS = {
    "write": {X86_64: 1, AARCH64: 64},
    "mmap": {X86_64: 9, AARCH64: 222},
    "munmap": {X86_64: 11, AARCH64: 215},
    "mremap": {X86_64: 25, AARCH64: 216},
    "brk": {X86_64: 12, AARCH64: 214},
    "rt_sigreturn": {X86_64: 15, AARCH64: 139},
    "restart_syscall": {X86_64: 219, AARCH64: 128},
    "nanosleep": {X86_64: 35, AARCH64: 101},
    "clock_nanosleep": {X86_64: 230, AARCH64: 115},
    "clock_gettime": {X86_64: 228, AARCH64: 113},
    "clock_getres": {X86_64: 229, AARCH64: 114},
    "gettimeofday": {X86_64: 96, AARCH64: 169},
    "getrandom": {X86_64: 318, AARCH64: 278},
    "exit": {X86_64: 60, AARCH64: 93},
    "exit_group": {X86_64: 231, AARCH64: 94},
}
X32_BIT = 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
FILTER_MODE = 2
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06


class Limits(NamedTuple):
    """What a cell may use."""

    seconds: float = 5.0
    """Of CPU; of the clock twice as many, for a machine that has much to do."""
    memory_mb: int = 256
    """Address space, the interpreter's own 30 MiB included."""


class Job(NamedTuple):
    """What a cell does: the code, then the steps, in the same namespace."""

    code: str
    steps: Sequence[str] = ()
    """Expressions, whose values come back, and statements. One that raises is left;
    none is done where the code raises, or a step ends the program."""
    given: dict[str, str] | None = None
    """Names and the values they have at first, as another cell gave them."""


class Outcome(NamedTuple):
    """What a cell answered, none of it to be trusted where its code is not."""

    values: list[str | None]
    """A step's value as JSON; None for a statement or where there is none."""
    error: str
    """What first went wrong; for people."""
    output: str
    """The beginning of what it printed; nothing where it was killed."""


class Sandbox:
    """Keepers, started as needed, and at most `workers` cells at a time, by default
    one a core. Leaving it as a context ends them; it can be entered again.

    Raises UserError where the machine cannot confine a cell: nothing has run then.
    """

    def __init__(self, limits: Limits, workers: int | None = None) -> None:
        machine = os.uname().machine
        if sys.platform != "linux" or machine not in ARCHITECTURES:
            raise UserError(
                "sandbox",
                f"none for {sys.platform} on {machine}",
                "judge code on Linux, on x86-64 or aarch64",
            )
        if min(limits) <= 0:
            raise UserError("sandbox", f"limits must be above 0: {limits}")
        self.limits = limits
        self.workers = workers or len(os.sched_getaffinity(0))
        self._idle: list[_Keeper] = []

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        idle, self._idle = self._idle, []
        for keeper in idle:
            keeper.kill()

    def run_all(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The jobs' outcomes, in their order."""
        # imported here: keepers, which import this file, start sooner without
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.run, jobs))

    def run(self, job: Job) -> Outcome:
        """Do one job; any thread may ask."""
        try:
            keeper = self._idle.pop()
        except IndexError:
            keeper = _Keeper()
        try:
            outcome = keeper.run(job, self.limits)
        except BaseException:
            keeper.kill()
            raise
        if keeper.process.returncode is None:
            self._idle.append(keeper)
        return outcome


def run_all(
    jobs: Sequence[Job], limits: Limits, workers: int | None = None
) -> list[Outcome]:
    """The jobs' outcomes, in their order, `workers` at a time."""
    with Sandbox(limits, workers) as sandbox:
        return sandbox.run_all(jobs)


class _Keeper:
    """The parent's end of a keeper: it hands jobs over and reads cells' answers."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(START_SECONDS)
        # one hash seed: sets have one order, so a program one reward
        environ = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:  # a cluster's Python may not start without
            environ["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        program = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from scripts.environments.sandbox import keep; keep()"
        )
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-S", "-B", "-W", "ignore", "-c", program],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=environ,
                cwd="/",
                start_new_session=True,
            )
        try:
            self._hear(1)
        except BaseException:
            self.kill()
            raise

    def run(self, job: Job, limits: Limits) -> Outcome:
        """Have one cell do a job. The keeper is gone after one that had to be killed."""
        order = {**job._asdict(), "limits": limits}
        answer, into = os.pipe()
        try:
            try:
                with open(os.memfd_create("job"), "w+b") as file:
                    file.write(json.dumps(order).encode())
                    file.seek(0)
                    socket.send_fds(self.socket, [b"j"], [file.fileno(), into])
            except OSError as error:
                raise _broken(str(error)) from error
            finally:
                os.close(into)
            seconds = 2 * limits.seconds + GRACE_SECONDS
            data, ended = _read(answer, seconds)
        finally:
            os.close(answer)
        if ended:
            killed = _why(int.from_bytes(self._hear(4), "little"))
        else:
            killed = "out of time" if len(data) < MOST_BYTES else "answered too much"
            self.kill()
        return _outcome(data, len(job.steps), killed)

    def kill(self) -> None:
        """End the keeper and its cell."""
        self.socket.close()
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _hear(self, size: int) -> bytes:
        try:
            heard = self.socket.recv(size, socket.MSG_WAITALL)
        except OSError as error:
            raise _broken(str(error)) from error
        if len(heard) < size:
            raise _broken("it ended")
        return heard


def _broken(why: str) -> UserError:
    return UserError(
        "sandbox",
        f"its process of {sys.executable} does not answer: {why}",
        "the log may say more; is there memory, and room for processes?",
    )


def _read(file: int, seconds: float) -> tuple[bytes, bool]:
    """What came, MOST_BYTES at most; and whether the other side ended in time."""
    data = bytearray()
    poll = select.poll()
    poll.register(file, select.POLLIN)
    end = time.monotonic() + seconds
    while len(data) < MOST_BYTES:
        left = end - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return bytes(data), False
        piece = os.read(file, MOST_BYTES - len(data))
        if not piece:
            return bytes(data), True
        data += piece
    return bytes(data), False


def _why(status: int) -> str:
    """What ended a cell; nothing where it ended of itself."""
    if not os.WIFSIGNALED(status):
        return ""
    number = os.WTERMSIG(status)
    if number in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL):
        return "out of time"
    return f"killed by signal {number}"


def _outcome(data: bytes, num_steps: int, killed: str) -> Outcome:
    """Read a cell's answer, which may be anything but for its first line."""
    head, whole, output = data.partition(b"\noutput\n")
    lines = head.split(b"\n")
    if not whole:
        lines.pop()  # cut short
    if lines[:1] != [b"ready"]:
        why = (lines or [b""])[0].decode("utf-8", "replace")
        raise UserError(
            "sandbox",
            f"a process cannot be confined: {why or killed or 'it ended'}",
            "seccomp filters must be allowed here, and `memory_mb` be enough",
        )
    values: list[str | None] = [None] * num_steps
    error = ""
    for line in lines[1:]:
        kind, _, rest = line.partition(b" ")
        text = rest.decode("utf-8", "replace")
        if kind == b"error":
            error = text
        elif kind.isdigit() and len(kind) < 7 and int(kind) < num_steps:
            values[int(kind)] = text
    return Outcome(values, killed or error, output.decode("utf-8", "replace"))


# The keeper's side: nothing below runs in the parent.


def keep() -> NoReturn:
    """Fork a cell for each job that comes, until the parent is gone."""
    for name in MODULES + UNASKED:
        importlib.import_module(name)
    random.seed(0)  # for the same reason as the hash seed
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    parent = socket.socket(fileno=0)
    confine = _Confine()
    parent.sendall(b"r")
    while True:
        _, files, _, _ = socket.recv_fds(parent, 1, 2)
        if not files:
            sys.exit()
        cell = os.fork()
        if cell == 0:
            _cell(confine, *files)
        for file in files:
            os.close(file)
        _, status = os.waitpid(cell, 0)
        parent.sendall(status.to_bytes(4, "little"))


def _cell(confine: _Confine, order: int, answer: int) -> NoReturn:
    """Do one job and end."""
    try:
        try:
            with open(order, "rb") as file:
                job = json.load(file)
            os.dup2(answer, 1)
            confine(Limits(*job["limits"]))
        except BaseException as error:
            os.write(1, f"{type(error).__name__}: {error}\n".encode())
        else:
            os.write(1, b"ready\n")
            _execute(Job(job["code"], job["steps"], job["given"]))
    finally:
        os._exit(0)


class _Confine:
    """Takes from a process all it will not need; what can be is prepared before."""

    def __init__(self) -> None:
        import ctypes

        self.keeper = os.getpid()
        self.ctypes, self.libc = ctypes, ctypes.CDLL(None, use_errno=True)
        code = _filter(os.uname().machine)
        self.code = ctypes.create_string_buffer(code)
        program = struct.pack("@HP", len(code) // 8, ctypes.addressof(self.code))
        self.program = ctypes.create_string_buffer(program)

    def __call__(self, limits: Limits) -> None:
        os.close(0)
        os.closerange(2, 64)  # the keeper has no more: its RLIMIT_NOFILE
        os.environ.clear()
        for name in list(sys.modules):
            if name.partition(".")[0] in HIDDEN:
                sys.modules[name] = None  # type: ignore[assignment]
        self.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.keeper:
            raise RuntimeError("the keeper is gone")

        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for name in ("SIGALRM", "SIGINT", "SIGPIPE", "SIGPROF", "SIGXCPU"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, limits.seconds)
        signal.setitimer(signal.ITIMER_REAL, 2 * limits.seconds)
        for name, most in {
            "RLIMIT_AS": limits.memory_mb << 20,
            "RLIMIT_CPU": math.ceil(limits.seconds) + 1,  # if the timer should fail
            **dict.fromkeys(["RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_MEMLOCK"], 0),
            **dict.fromkeys(["RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_MSGQUEUE"], 0),
        }.items():
            kind = getattr(resource, name)
            _, hard = resource.getrlimit(kind)  # a batch system may have set it
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))

        self.prctl(PR_SET_DUMPABLE, 0)
        self.prctl(PR_SET_NO_NEW_PRIVS, 1)
        address = self.ctypes.addressof(self.program)
        self.prctl(PR_SET_SECCOMP, FILTER_MODE, address)
        try:  # some emulated kernels take a filter and do not heed it
            os.stat("/")
        except PermissionError:
            return
        raise RuntimeError("the filter is not heeded")

    def prctl(self, option: int, *given: int) -> None:
        """Call prctl. Raises OSError where it fails."""
        values = [self.ctypes.c_ulong(value) for value in (*given, 0, 0, 0, 0)[:4]]
        if self.libc.prctl(option, *values) != 0:
            number = self.ctypes.get_errno()
            raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def _filter(machine: str) -> bytes:
    """The filter, in classic BPF: kill another architecture, refuse what is not listed.

    x32's calls are the same architecture's, with a bit set in their numbers.
    """
    numbers = [call[machine] for call in CALLS.values()]
    code = [
        (LOAD, 0, 0, 4),  # seccomp_data.arch
        (EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # seccomp_data.nr
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL),
        *((EQUAL, len(numbers) - at, 0, nr) for at, nr in enumerate(numbers)),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def _execute(job: Job) -> None:
    """Run the code and the steps, telling each value at once: a later one may hang."""
    printed = io.BytesIO()  # the limit of memory is its own
    sys.stdout = sys.stderr = io.TextIOWrapper(
        printed, "utf-8", "replace", write_through=True
    )
    sys.stdin = io.StringIO()
    # a module, since dataclasses look theirs up; not __main__, whose demo would run
    module = sys.modules["program"] = types.ModuleType("program")
    scope = vars(module)
    error = ""
    try:
        for name, value in (job.given or {}).items():
            scope[name] = json.loads(value, object_hook=_decoded)
        exec(compile(job.code, "<program>", "exec", dont_inherit=True), scope)  # noqa: S102
        for number, step in enumerate(job.steps):
            try:
                _step(number, step, scope)
            except Exception as found:
                error = error or f"{type(found).__name__}: {found}"
    except BaseException as found:
        error = error or f"{type(found).__name__}: {found}"
    _tell("error " + " ".join(error.split())[:OUTPUT_BYTES])
    output = printed.getvalue()[:OUTPUT_BYTES].decode("utf-8", "ignore")
    _tell("output\n" + output.removesuffix("\n"))


def _step(number: int, step: str, scope: dict[str, Any]) -> None:
    try:
        code = compile(step, "<step>", "eval", dont_inherit=True)
    except SyntaxError:
        exec(compile(step, "<step>", "exec", dont_inherit=True), scope)  # noqa: S102
        return
    value = eval(code, scope)  # noqa: S307
    _tell(f"{number} {json.dumps(encoded(value))}")


def _tell(line: str) -> None:
    data = line.encode("utf-8", "replace") + b"\n"
    while data:
        data = data[os.write(1, data) :]


# JSON has fewer types than Python; an object of one key tells the others.

ITEMS: dict[str, type] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes,
    "deque": collections.deque,
}
TEXTS: dict[str, type] = {
    "complex": complex,
    "fraction": fractions.Fraction,
    "decimal": decimal.Decimal,
}


class Opaque:
    """Stands for what another cell has: equal to nothing, and true or not."""

    def __init__(self, truth: bool) -> None:
        self.truth = truth

    def __bool__(self) -> bool:
        return self.truth


def encoded(value: Any) -> Any:
    """A value as JSON has it: those of builtin types whole, of others their truth."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):  # int() reads no long decimals, but any hexadecimals
        return int(value) if abs(value) < 1 << 63 else {"int": hex(value)}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encoded(k), encoded(v)] for k, v in value.items()]}
    for name, kind in ITEMS.items():
        if isinstance(value, kind):
            return {name: [encoded(item) for item in value]}  # type: ignore[attr-defined]
    for name, kind in TEXTS.items():
        if isinstance(value, kind):
            return {name: str(value)}
    return {"object": bool(value)}


def _decoded(found: dict[str, Any]) -> Any:
    """The value of an object of one key; its items are decoded already."""
    [(name, value)] = found.items()
    if name == "int":
        return int(value, 16)
    if name == "dict":
        return dict(value)
    if name == "object":
        return Opaque(value)
    return (ITEMS | TEXTS)[name](value)
