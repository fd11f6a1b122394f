"""What code and which pinned versions a node's result depends on.

A stage's code is its script and every module of this project that it imports,
compared as syntax trees: comments, docstrings and formatting do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sys
from importlib import metadata
from pathlib import Path

from scripts.lib.digest import Kept
from scripts.lib.errors import UserError
from scripts.lib.schema import Engine

LOCKS: dict[Engine, Path] = {
    "transformers": Path("envs/transformers.lock"),
    "nvidia": Path("envs/nvidia.lock"),
}

OF_RL = Path("envs/nemo-rl.lock")
"""What the engine nvidia takes from NVIDIA's container alone."""

NEUTRAL = {f"scripts.lib.{name}" for name in ("cli", "errors", "progress", "schema")}
NEUTRAL |= {"scripts.lib.tracking", "scripts.nvidia.parity"}
"""Modules that cannot change a result: the recipe they check is identity itself, and a
check decides whether something is published, not what.
"""


READ = Kept(Path("state/code.json"), Path(__file__), str(sys.version_info[:2]))
"""What was read of a file's code, by its bytes: parsing all of it takes a while."""


def _file_of(module: str) -> Path | None:
    base = Path(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _parsed(path: Path, source: bytes) -> ast.Module:
    try:
        return ast.parse(source.decode("utf-8"))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}", f"not Python: {error.msg}") from error


def _imports(path: Path) -> set[str]:
    """Modules a file names in imports, at any depth, `from a import b` as a and a.b."""
    return set(_read(path)[1])


@functools.cache
def _read(path: Path) -> tuple[bool, list[str], str]:
    """Whether a file holds any code, the modules it names, and its code's digest."""
    source = path.read_bytes()
    known = READ.get(str(path), source)
    if known is None:
        tree = _parsed(path, source)
        digest = hashlib.sha256(_canonical(tree).encode()).hexdigest()[:16]
        known = [bool(tree.body), sorted(_named(tree)), digest]
        READ.put(str(path), source, known)
    return known[0], known[1], known[2]


def _named(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def modules_of(script: str) -> tuple[str, ...]:
    """The project's modules that `script` is made of, itself included, sorted."""
    seen: set[str] = set()
    todo = [script]
    while todo:
        module = todo.pop()
        path = _file_of(module)
        if path is None or module in seen or module in NEUTRAL:
            continue
        if _read(path)[0]:
            seen.add(module)
        todo += [m for m in _imports(path) if m.split(".")[0] == "scripts"]
    return tuple(sorted(seen))


def third_party_of(script: str) -> set[str]:
    """Top-level names that the script's modules import from outside the project."""
    names: set[str] = set()
    for module in modules_of(script):
        path = _file_of(module)
        assert path is not None
        names |= {name.split(".")[0] for name in _imports(path)}
    return names - {"scripts"}


def _canonical(node: object) -> str:
    """A syntax tree as text that does not depend on Python's version.

    Docstrings and empty fields are left out: newer Pythons add empty fields.
    """
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    body = fields.get("body")
    if isinstance(body, list) and body and isinstance(node, _DOCUMENTED):
        first = body[0]
        value = first.value if isinstance(first, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            fields["body"] = body[1:]
    inner = ",".join(
        f"{name}={_canonical(value)}"
        for name, value in fields.items()
        if value is not None and value != [] and name not in ("kind", "type_comment")
    )
    return f"{type(node).__name__}({inner})"


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _module_digest(module: str) -> str:
    path = _file_of(module)
    assert path is not None
    return _read(path)[2]


@functools.cache
def code_of(script: str) -> dict[str, str]:
    """{file: digest} of the stage's code, the same for comments and formatting.

    Raises UserError where the script is missing or not Python.
    """
    modules = modules_of(script)
    if script not in modules:
        raise UserError(script, "no such script in this project")
    code = {str(_file_of(m)): _module_digest(m) for m in modules}
    name = script.rpartition(".")[2]
    for path in sorted(Path("scripts/templates").glob(f"{name}.*")):
        code[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return code


def as_now(code: dict[str, str]) -> dict[str, str]:
    """These files' digests as they are now; of what is gone, an empty one."""
    found = {}
    for file in code:
        path = Path(file)
        if not path.is_file():
            found[file] = ""
        elif path.suffix == ".py":
            found[file] = _module_digest(".".join(path.with_suffix("").parts))
        else:
            found[file] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def forget() -> None:
    """Read the code and the locks anew from here on."""
    for cached in (_read, modules_of, code_of, pins, installed):
        cached.cache_clear()


def locks_of(engine: Engine) -> list[Path]:
    """The lock files that pin an engine's packages."""
    return [LOCKS[engine], *([OF_RL] if engine == "nvidia" else [])]


@functools.cache
def pins(engine: Engine = "transformers") -> dict[str, str]:
    """{package: version} of an engine's lock file, as pip reads it, hashes or not."""
    text = ""
    for lock in locks_of(engine):
        try:
            text += lock.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            where, what = str(lock), f"no such file, with engine: {engine}"
            raise UserError(where, what) from error
    found = re.findall(r"(?m)^([\w.-]+)(?:\[[^\]]*\])?\s*==\s*([^\s;#\\]+)", text)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


@functools.cache
def installed(package: str) -> str:
    """The version of a package here, without what follows a `+`."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"


def versions(
    packages: tuple[str, ...], engine: Engine = "transformers"
) -> dict[str, str]:
    """The pinned versions of these packages.

    Raises UserError where the lock lacks one, or what is installed is another version.
    The packages of nvidia are elsewhere, in another environment or a container: its
    scripts compare them as they start.
    """
    lock, pinned = LOCKS[engine], pins(engine)
    if lacking := sorted(set(packages) - set(pinned)):
        raise UserError(
            f"{lock} {lacking[0]}", "not pinned", f"add a line {lacking[0]}==VERSION"
        )
    result = {name: pinned[name] for name in sorted(packages)}
    if engine == "nvidia":
        return result
    for name, version in result.items():
        found = installed(name)
        if found != version:
            raise UserError(
                f"{lock} {name}",
                f"pinned at {version}, but here it is {found}",
                "run `make env`",
            )
    return result
