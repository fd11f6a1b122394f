"""The sandbox lets programs compute and nothing else; `code` rewards right values."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from scripts.environments import sandbox
from scripts.environments.code import BadTests, Code, plan, program
from scripts.environments.sandbox import CALLS, Job, Limits, Outcome, Sandbox, run_all
from scripts.lib.errors import DataError, UserError

ADD = "assert add(1, 2) == 3"
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return None\n"
QUICK = Limits(seconds=0.5, memory_mb=128)
CONFINE = """
import sys

frame = sys._getframe()
while not hasattr(frame.f_locals.get("confine"), "libc"):
    frame = frame.f_back
ctypes, libc = frame.f_locals["confine"].ctypes, frame.f_locals["confine"].libc
"""
"""Finds the loader's own ctypes, which is hidden from `import` alone."""


def reward(code: str, tests: str = ADD, **settings: object) -> float:
    messages = [{"role": "assistant", "content": textwrap.dedent(code)}]
    given = {"seconds": 1.0, "memory_mb": 128, "workers": 1} | settings
    return Code(**given).step(messages, {"input": "?", "output": tests})  # type: ignore[arg-type]


def run(code: str, *steps: str, limits: Limits = QUICK) -> Outcome:
    [outcome] = run_all([Job(textwrap.dedent(code), steps)], limits, 1)
    return outcome


# Honest programs

HONEST = {
    "function": (RIGHT, ADD),
    "recursion": (
        "def fact(n):\n    return 1 if n < 2 else n * fact(n - 1)",
        "assert fact(20) == 2432902008176640000\nassert fact(30) == fact(29) * 30",
    ),
    "class": (
        """
        from dataclasses import dataclass, field

        @dataclass
        class Stack:
            items: list[int] = field(default_factory=list)
            def push(self, item): self.items.append(item)
            def pop(self): return self.items.pop()
            def __len__(self): return len(self.items)
        """,
        "s = Stack()\ns.push(4)\nassert len(s) == 1 and s.pop() == 4\nassert not s",
    ),
    "modules": (
        """
        import collections, datetime, decimal, fractions, functools, heapq, itertools
        import json, math, random, re, statistics, string, typing
        from enum import Enum, IntEnum

        class Level(IntEnum):
            LOW = 1

        @functools.cache
        def f(x: typing.Optional[int]): return math.comb(x, 2)
        def words(t): return collections.Counter(re.findall(r"\\w+", t))
        def day(t): return datetime.datetime.strptime(t, "%Y-%m-%d").strftime("%a")
        def half(): return fractions.Fraction(1, 2), decimal.Decimal("0.5")
        def draw(): return random.Random(1).randint(1, 6) in range(1, 7)
        def name(): return "\\N{BULLET}".encode("utf-16-le")
        """,
        """
        from collections import Counter
        from fractions import Fraction
        assert f(5) == 10
        assert words("a b a") == {"a": 2, "b": 1} == Counter("aab")
        assert day("2024-02-29") == "Thu"
        assert half() == (Fraction(1, 2), 0.5)
        assert draw() is True
        assert name() == b"\\x22\\x20"
        assert Level.LOW == 1
        """,
    ),
    "floats": (
        "def mean(x):\n    return sum(x) / len(x)",
        "import math\nassert abs(mean([1, 2]) - 1.5) < 1e-9\n"
        "assert math.isclose(mean([0.1, 0.2]), 0.15, rel_tol=1e-6)\n"
        "assert isinstance(mean([1]), float) and round(mean([2, 3, 3]), 2) == 2.67",
    ),
    "containers": (
        "def f(x):\n    return {1: (x, [None, True]), 'a': {x, 2}, b'b': {}}",
        "assert f(1) == {1: (1, [None, True]), 'a': {1, 2}, b'b': {}}\n"
        "assert f(1)[1][1] is not None and f(1).get('c') is None",
    ),
    "generator": (
        "def up(n):\n    yield from range(n)",
        "assert list(up(3)) == [0, 1, 2]\nassert sum(up(4)) == 6",
    ),
    "big numbers": (
        "def f(n):\n    return 2**n",
        "assert f(20000) == 2**20000\nassert f(64) == 18446744073709551616",
    ),
    "named like a builtin": (
        "def sum(a, b):\n    return a + b",
        "assert sum(10, 5) == 15\nassert sum(1, 2) == 3",
    ),
    "in place": (
        "def sort(x):\n    x.sort()",
        "x = [3, 1]\nsort(x)\nassert x == [1, 3]",
    ),
    "many lines and helpers": (
        RIGHT,
        "def close(a, b):\n    return abs(a - b) < 1e-6\nexpected = 3.5\n"
        "assert close(\n    add(1, 2.5),\n    expected,\n), 'message'",
    ),
    "an error is expected": (
        "def f(x):\n    raise ValueError(x)",
        "try:\n    f(1)\n    raised = False\nexcept ValueError:\n    raised = True\n"
        "assert raised",
    ),
    "printing, and a demo": (
        RIGHT + "print('x' * 100_000)\nif __name__ == '__main__':\n    input()",
        ADD,
    ),
    "subclass with its own": (
        "class P:\n    def __init__(self, x): self.x = x\n"
        "    def __repr__(self): return f'P({self.x})'",
        "assert str(P(1)) == 'P(1)'\nassert P(2).x == 2\nassert P(1) is not None",
    ),
    "functions as arguments": (
        "def f(x):\n    return -x",
        "assert list(map(f, [1, 2])) == [-1, -2]\nassert sorted([1, 2], key=f) == [2, 1]",
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_right_programs_are_rewarded(name: str) -> None:
    code, tests = (textwrap.dedent(text) for text in HONEST[name])
    assert reward(code, tests) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "def add(a, b):\n    return a - b",
        "def add(a, b):\n    return '3'",
        "def add(a, b):\n    return [3]",
        "def add(a):\n    return 3",
        "def sub(a, b):\n    return 3",
        "def add(a, b):\n    raise ValueError",
        "def add(a, b) return a + b",
        "",
        "The sum is 3.",
        RIGHT + "1 / 0",
        "\0" + RIGHT,
        "\ud800" + RIGHT,
        "import numpy\n" + RIGHT,
    ],
)
def test_wrong_programs_are_not_rewarded(code: str) -> None:
    assert reward(code) == 0.0


def test_all_assertions_count_or_with_partial_each() -> None:
    tests = "assert add(1, 2) == 3\nassert add(2, 2) == 4\nassert add(0, 0) == 0"
    code = "def add(a, b):\n    return 3 if a else 0"
    assert reward(code, tests) == 0.0
    assert reward(code, tests, partial=True) == pytest.approx(2 / 3)


def test_what_passed_before_a_hang_counts_with_partial() -> None:
    code = "def f(x):\n    while x: pass\n    return x"
    tests = "assert f(0) == 0\nassert f(1) == 1"
    assert reward(code, tests, partial=True, seconds=0.3) == 0.5


def test_a_programs_own_names_do_not_change_assertions() -> None:
    code = "abs = round = lambda *_: 0\ndef mean(x):\n    return 7"
    assert reward(code, "assert abs(mean([1, 2]) - 1.5) < 1e-9") == 0.0
    code = "import math\nmath.isclose = lambda *_, **__: True\ndef f():\n    return 7"
    assert reward(code, "import math\nassert math.isclose(f(), 1.5)") == 0.0
    code = "expected = 7\ndef f():\n    return 7"
    assert reward(code, "expected = 8\nassert f() == expected") == 0.0


def test_a_program_has_one_reward() -> None:
    code = "def f():\n    return list({'a', 'b', 'c', 'd', 'e'}), hash('a')"
    first, second = (run(code, "f()").values for _ in range(2))
    assert first == second != [None]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("a = 1", "a = 1"),
        ("Hm.\n```python\na = 1\n```\nSo.", "a = 1"),
        ("```python\na = 1\n```\n```py\nb = 2\n\nc = 3\n```\n", "b = 2\n\nc = 3"),
        ("```\nno\n```\n```Python\r\na = 1\n```", "a = 1"),
        ("```python\na = 1", "```python\na = 1"),
        ("```python\na = 1\n```\n```python\nb = ", "a = 1"),
        ("```python\na = '```python'\n```", "a = '```python'"),
    ],
)
def test_the_last_whole_block_is_the_program(message: str, code: str) -> None:
    assert program(message) == code


@pytest.mark.parametrize(
    "tests",
    [
        "",
        "x = 1",
        "assert add(1, 2 == 3",
        "assert True",
        "x = 3\nassert x == 3",
        "for x in [1]:\n    assert add(x, x) == 2",
        "def check(f):\n    assert f(1, 2) == 3\ncheck(add)",
        "assert all(add(x, 0) == y for x, y in [(1, 1)])",
        "import numpy\nassert add(1, 2) == 3",
        "from math import *\nassert add(1, 2) == 3",
        "assert add(1, 2) == " + "(" * 1000 + "3" + ")" * 1000,
    ],
)
def test_rows_that_cannot_be_judged_are_named(tests: str) -> None:
    row = {"input": "Write add, please. " * 9, "output": tests}
    with pytest.raises(DataError, match=r"row 'Write add, please\. .{1,60}': `output`"):
        Code().step([{"role": "assistant", "content": RIGHT}], row)


@pytest.mark.parametrize(
    ("tests", "told"),
    [
        (ADD, ["add(1, 2)"]),
        ("expected = 3\nassert add(1, 2) == expected", ["add(1, 2)"]),
        ("x = 3\nassert add(x, 2) == x", ["x = 3", "add(x, 2)", "x"]),
        ("assert max(add(1, 2), 7) - 3 < 5", ["add(1, 2)"]),
        ("assert [add(1, 2), 4] == [3, 4]", ["add(1, 2)"]),
        ("assert len(add('a', 'b')) == 2", ["len(add('a', 'b'))"]),
        ("assert isinstance(add(1, 2), int)", ["add(1, 2)"]),
    ],
)
def test_programs_are_told_only_what_they_need(tests: str, told: list[str]) -> None:
    assert plan(tests).steps == told


def test_plans_are_refused_by_name() -> None:
    with pytest.raises(BadTests, match="asserts nothing of the program"):
        plan("assert 1 == 1")


# Programs that reach for something


def test_files_and_secrets_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("loot")
    monkeypatch.setenv("SECRET", "loot")
    programs = [
        f"return open({str(tmp_path / 'secret')!r}).read()",
        f"import os\n    return os.read(os.open({str(tmp_path / 'secret')!r}, 0), 9)",
        f"import os\n    return 'loot' * os.path.exists({str(tmp_path)!r})",
        f"import os\n    return 'loot' * ('secret' in os.listdir({str(tmp_path)!r}))",
        f"import os\n    return 'loot' * bool(list(os.scandir({str(tmp_path)!r})))",
        "import os\n    return os.environ['SECRET']",
        "return 'loot' * ('root:' in open('/etc/passwd').read())",
        "return 'loot' * (b'SECRET' in open('/proc/self/environ', 'rb').read())",
    ]
    for body in programs:
        code = f"def steal():\n    {body}\n"
        scope: dict[str, object] = {}
        exec(code, scope)
        found = scope["steal"]() if "proc" not in code else "loot"  # type: ignore[operator]
        assert found in ("loot", b"loot"), "the program is no threat: " + code
        assert reward(code, "assert steal() in ('loot', b'loot')") == 0.0


# signal 0 is refused like others; it would do no harm if it were not
REACHES = {
    "write": "open('{tmp}/made', 'w')",
    "mkdir": "os.mkdir('{tmp}/made')",
    "link": "os.symlink('/etc/passwd', '{tmp}/made')",
    "list": "os.listdir('/')",
    "folder": "os.getcwd()",
    "pipe": "os.pipe()",
    "tcp": "socket.create_connection((b'127.0.0.1', {tcp}))",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix": "socket.socketpair()",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "fork": "os.fork()",
    "forkpty": "os.forkpty()",
    "subprocess": "subprocess.run(['touch', '{tmp}/made'])",
    "spawn": "os.posix_spawn('/bin/touch', ['touch', '{tmp}/made'], {{}})",
    "exec": "os.execv('/bin/touch', ['touch', '{tmp}/made'])",
    "memfd": "os.memfd_create('x')",
    "kill the tests": "os.kill({pid}, 9)",
    "kill the keeper": "os.kill(os.getppid(), 9)",
    "kill all": "os.kill(-1, 0)",
    "kill the group": "os.killpg(0, 0)",
    "ignore SIGTERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "ignore SIGXCPU": "signal.signal(signal.SIGXCPU, signal.SIG_IGN)",
    "block SIGALRM": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])",
    "no timer": "signal.setitimer(signal.ITIMER_PROF, 0)",
    "memory": "open('/dev/mem', 'rb')",
    "own memory": "open('/proc/self/mem', 'rb')",
    "set uid": "os.setuid(0)",
    "chroot": "os.chroot('/')",
    "nice": "os.nice(-1)",
}


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What comes of each of REACHES, of which the folder and the server see nothing."""
    tmp = tmp_path_factory.mktemp("reached")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        given = {"tmp": tmp, "tcp": server.getsockname()[1], "pid": os.getpid()}
        code = "import os, signal, socket, subprocess"
        jobs = [Job(code, [what.format(**given)]) for what in REACHES.values()]
        outcomes = run_all(jobs, QUICK, 2)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert list(tmp.iterdir()) == []
    return dict(zip(REACHES, outcomes, strict=True))


@pytest.mark.parametrize("name", REACHES)
def test_nothing_but_computing_is_allowed(
    name: str, reached: dict[str, Outcome]
) -> None:
    assert reached[name].values == [None]
    assert re.match(".*(Operation not permitted|No such process)", reached[name].error)


def test_names_are_not_looked_up_and_datagrams_not_sent() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        port = server.getsockname()[1]
        send = """
        import socket
        def send(port):
            kind = socket.SOCK_DGRAM
            for file in [*range(9), None]:
                try:
                    s = socket.socket(socket.AF_INET, kind, fileno=file)
                    s.sendto(b"x", ("127.0.0.1", port))
                except OSError:
                    continue
                return file
        """
        assert run(send, f"send({port})").values == ["null"]
        look = run("import socket", "socket.getaddrinfo(b'localhost', 80)")
        assert look.error and look.values == [None]
        with pytest.raises(BlockingIOError):
            server.recv(1)


def test_threads_and_pools_do_not_start() -> None:
    outcome = run("import threading\nthreading.Thread(target=print).start()")
    assert "can't start new thread" in outcome.error


def test_a_fork_bomb_is_one_process() -> None:
    code = """
    import os
    def bomb():
        for n in range(1000):
            try:
                os.fork()
            except PermissionError:
                continue
            return n
    """
    assert run(code, "bomb()").values == ["null"]


@pytest.mark.parametrize(
    "code",
    [
        "import ctypes",
        "import _ctypes",
        "from scripts.environments import sandbox",
        "import sys\nfor n in list(sys.modules):\n"
        "    if 'ctypes' in n: del sys.modules[n]\nimport ctypes",
        "import importlib\nimportlib.import_module('ctypes').CDLL(None)",
        "import sys\nsys.path.insert(0, '/usr/lib')\nimport sqlite3",
    ],
)
def test_what_was_not_loaded_is_not_imported(code: str) -> None:
    assert re.match("ModuleNotFoundError|ImportError", run(code).error)


def test_machine_code_gets_no_other_system_call() -> None:
    # uprobe and uretprobe are fatal too, and never filtered: they are the kernel's own
    code = f"""
    allowed = {[call[os.uname().machine] for call in CALLS.values()]} + [335, 336]
    def done():
        found = []
        for number in range(1024):
            if number not in allowed:
                if libc.syscall(number, -1, 0, 0, 0, 0, 0) != -1:
                    found.append(number)
                elif ctypes.get_errno() != {errno.EPERM}:
                    found.append(number)
        return found
    """
    outcome = run(CONFINE + textwrap.dedent(code), "done()")
    assert outcome.values == ["[]"], outcome.error


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has three tables")
@pytest.mark.parametrize("code", ["b8 14 00 00 00 cd 80 c3", "b8 27 00 00 40 0f 05 c3"])
def test_other_tables_of_system_calls_are_fatal(code: str) -> None:
    # getpid by int 0x80, and by x32's number
    outcome = run(
        CONFINE
        + textwrap.dedent(f"""
        libc.mmap.restype = ctypes.c_void_p
        page = libc.mmap(None, 4096, 7, 0x22, -1, 0)
        ctypes.memmove(page, bytes.fromhex({code!r}), 8)
        call = ctypes.CFUNCTYPE(ctypes.c_int)(page)
        """),
        "call()",
    )
    assert outcome.values == [None]
    assert outcome.error == f"killed by signal {signal.SIGSYS:d}"


# Programs that take too much

HOGS = {
    "loop": "while True: pass",
    "loop in C": "import itertools, collections\ncollections.deque(itertools.count())",
    "catches all": "while True:\n    try:\n        while True: pass\n"
    "    except BaseException: pass",
    "power": "9**9**9",
    "regex": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "sleep": "import time\nwhile True: time.sleep(1000)",
    "lock": "import threading\nthreading.Lock().acquire() and threading.Event().wait()",
    "bytes": "x = bytes(10**10)",
    "list": "x = []\nwhile True: x.append(' ' * 9999)",
    "list caught": "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n"
    "    except MemoryError: pass",
    "text": "x = 'x' * 10**9",
    "prints": "while True: print('x' * 9999)",
    "writes": "import os\nwhile True: os.write(1, b'0 3\\n' * 9999)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "recursion in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\n"
    "for _ in range(10**6): x = [x]\nrepr(x)",
    "source": "exec('(' * 10**6 + ')' * 10**6)",
    "dies": "import os\nos.abort()",
}


def test_programs_in_parallel_are_bounded_in_time_and_memory() -> None:
    jobs = [Job(code + "\n" + RIGHT, ["add(1, 2)"]) for code in HOGS.values()]
    began = time.monotonic()
    with Sandbox(QUICK, 8) as box:
        outcomes = box.run_all(jobs)
        took = time.monotonic() - began
        # the sandbox is as good as before
        assert box.run(Job(RIGHT, ["add(1, 2)"])).values == ["3"]
    for name, outcome in zip(HOGS, outcomes, strict=True):
        assert outcome.error, name
        if name != "writes":  # which may write anything
            assert outcome.values == [None], name
    alone = len(HOGS) * 2 * QUICK.seconds
    assert took < alone


def test_sleepers_do_not_wait_for_each_other() -> None:
    jobs = [Job("import time\ntime.sleep(1000)")] * 8
    began = time.monotonic()
    outcomes = run_all(jobs, Limits(seconds=0.5), 8)
    assert {outcome.error for outcome in outcomes} == {"out of time"}
    assert time.monotonic() - began < 8 * 2 * 0.5 / 2


def test_memory_is_what_the_limit_says() -> None:
    code = "x = bytearray(100 << 20)"
    assert run(code, limits=Limits(1, 256)).error == ""
    assert run(code, limits=Limits(1, 64)).error.startswith("MemoryError")


def test_the_parent_kills_what_the_kernel_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = Limits(seconds=20)
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 1 - 2 * limits.seconds)
    began = time.monotonic()
    outcome = run("import time\ntime.sleep(1000)", limits=limits)
    assert outcome.error == "out of time"
    assert time.monotonic() - began < limits.seconds


def test_nothing_is_left_of_a_parent_that_was_killed() -> None:
    script = """
    from scripts.environments.sandbox import Job, Limits, Sandbox
    box = Sandbox(Limits(seconds=0.5), 1)
    box.run(Job(""))
    print(box._idle[0].process.pid, flush=True)
    box.run(Job("while True: pass"))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as parent:
        assert parent.stdout is not None
        keeper = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    poll = select.poll()
    poll.register(keeper, select.POLLIN)
    assert poll.poll(10_000)
    os.close(keeper)


# Programs that would have the reward without the work

FORGERS = {
    "SystemExit": "raise SystemExit(0)",
    "exit in the call": "def add(a, b): raise SystemExit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
    "says so": WRONG + "print('ready\\n0 3\\n1 true\\npassed\\nOK')",
    "true": "def add(a, b): return True",
    "AssertionError": WRONG + "import builtins\nbuiltins.AssertionError = int",
    "excepthook": WRONG + "import sys\nsys.excepthook = lambda *_: None",
    "threading": WRONG + "import threading\nthreading.Thread.start = lambda _: None",
    "equal to all": """
        class Equal:
            def __eq__(self, other): return True
            __hash__ = None
        def add(a, b): return Equal()
        """,
    "number equal to all": """
        class Equal(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = int.__hash__
        def add(a, b): return Equal(7)
        """,
    "text and list equal to all": """
        class Equal(list):
            def __eq__(self, other): return True
        def add(a, b): return Equal([7])
        """,
    "builtins": """
        import builtins
        builtins.bool = builtins.all = lambda *_: True
        builtins.compile = lambda *_, **__: (lambda: 3).__code__
        def add(a, b): return 7
        """,
    "json": """
        import json
        json.dumps = lambda _: 'true'
        json.loads = lambda *_, **__: True
        def add(a, b): return 7
        """,
    "the loader": """
        import sys
        frame = sys._getframe()
        while "encoded" not in frame.f_globals: frame = frame.f_back
        for name in ("encoded", "_step", "_tell"):
            frame.f_globals[name] = lambda *_: True
        frame.f_locals["job"].steps.clear()
        def add(a, b): return 7
        """,
    "answers first": """
        import os
        for fd in range(65):
            try:
                os.write(fd, b'ready\\n0 true\\n1 true\\n0 "3"\\noutput\\n0 true\\n')
            except OSError:
                pass
        os._exit(0)
        """,
    "no answer": """
        import os
        for fd in range(65):
            try:
                os.close(fd)
            except OSError:
                pass
        def add(a, b): return None
        """,
    "bad answers": """
        import os
        os.write(1, b'0 ' + b'[' * 100000 + b'\\n9 1\\n-1 1\\n' + bytes(range(256)))
        os.write(1, b'\\n0 {"object": true, "int": "3"}\\n\\xff 1\\nerror \\xff\\n')
        """,
    "a set that cannot be": """
        import os
        os.write(1, b'0 {"set": [[1]]}\\n')
        os._exit(0)
        """,
}


def test_verdicts_are_not_forged() -> None:
    conversations = [
        [{"role": "assistant", "content": textwrap.dedent(code)}]
        for code in [*FORGERS.values(), RIGHT]
    ]
    rows = [{"input": name, "output": ADD} for name in [*FORGERS, "honest"]]
    rewards = Code(seconds=1.0, workers=2).steps(conversations, rows)
    rewarded = [r["input"] for r, worth in zip(rows, rewards, strict=True) if worth]
    assert rewarded == ["honest"]


def test_what_is_expected_is_not_in_the_programs_reach() -> None:
    code = """
    import gc, sys

    def texts():
        frame = sys._getframe()
        while frame:
            yield from (repr(v) for v in frame.f_locals.values() if v is not frame)
            frame = frame.f_back
        for found in gc.get_objects():
            yield from (repr(v) for v in gc.get_referents(found)
                        if type(v) in (str, int, float, bytes, list, tuple, dict))

    def seek(_):
        start = "".join(["91", "827"])
        for text in texts():
            at = text.find(start)
            if at >= 0 and text[at : at + 9].isdigit():
                return int(text[at : at + 9])
        return 0
    """
    assert reward(code, "assert seek(918273645) == 918273645", seconds=5.0) == 1.0
    assert reward(code, "assert seek(0) == 918273645", seconds=5.0) == 0.0
    tests = "expected = 918273645\nassert seek(0) == expected"
    assert reward(code, tests, seconds=5.0) == 0.0


def test_one_program_leaves_nothing_to_the_next() -> None:
    first = """
    import builtins, math, sys
    builtins.len = math.floor = lambda _: 7
    sys.modules["left"] = builtins.left = "left"
    """
    second = "import math, sys\nx = len([1]), math.floor(1.5), 'left' in sys.modules"
    with Sandbox(QUICK, 1) as box:
        box.run(Job(textwrap.dedent(first)))
        [value] = box.run(Job(second, ["x"])).values
    assert value == '{"tuple": [1, 1, false]}'


# Machines without


def test_a_machine_that_is_not_known_runs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(UserError, match="none for darwin"):
            Code()
    machine = os.uname_result(("Linux", "", "", "", "riscv64"))
    monkeypatch.setattr(os, "uname", lambda: machine)
    with pytest.raises(UserError, match="none for linux on riscv64"):
        Code()


@pytest.mark.parametrize("limits", [{"seconds": 0.0}, {"memory_mb": 0}])
def test_no_limit_can_be_lifted(limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match="above 0"):
        Code(**limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "why"),
    [(errno.EINVAL, "prctl 22: Invalid argument"), (0, "the filter is not heeded")],
)
def test_a_kernel_without_seccomp_runs_nothing(number: int, why: str) -> None:
    # a filter of its own makes prctl(PR_SET_SECCOMP) fail, or succeed to no effect
    nr = {"x86_64": 157, "aarch64": 167}[os.uname().machine]
    code = [
        *((0x20, 0, 0, 0), (0x15, 0, 3, nr)),
        *((0x20, 0, 0, 16), (0x15, 0, 1, 22)),
        *((0x06, 0, 0, 0x00050000 | number), (0x06, 0, 0, 0x7FFF0000)),
    ]
    script = f"""
    import ctypes, struct
    code = ctypes.create_string_buffer({b"".join(struct.pack("=HBBI", *c) for c in code)})
    line = struct.pack("@HP", {len(code)}, ctypes.addressof(code))
    line = ctypes.create_string_buffer(line)
    libc, zero = ctypes.CDLL(None), ctypes.c_ulong(0)
    assert libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero) == 0
    assert libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(line), zero, zero) == 0
    from scripts.environments.sandbox import Job, Limits, run_all
    from scripts.lib.errors import UserError
    try:
        print(run_all([Job("print('it ran')", ["1"])], Limits(), 1))
    except UserError as error:
        print(error)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert why in found.stdout
    assert "cannot be confined" in found.stdout
    assert "it ran" not in found.stdout
