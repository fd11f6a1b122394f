"""What every stage's command line shares: flags, the recipe, how errors look."""

from __future__ import annotations

import argparse
import errno
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pydantic

from scripts.lib.errors import RecipeError, UserError

NOT_DONE = 75
"""Exit code of a script that saved and stopped before its last step."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Recipe = TypeVar("Recipe", bound=pydantic.BaseModel)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A stage's parser with --recipe, --out and --work; `doc` is shown by --help."""
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--recipe", type=Path, required=True, help="YAML: the node's settings"
    )
    result.add_argument(
        "--out", type=Path, required=True, help="folder the result goes to"
    )
    result.add_argument(
        "--work",
        type=Path,
        help="folder of saves and progress.json; default: OUT with .work added",
    )
    return result


def parse(flags: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse `argv`, set the default of --work, make both folders."""
    args = flags.parse_args(argv)
    args.work = args.work or args.out.with_name(args.out.name + ".work")
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def rows_parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a stage that turns rows into tokens."""
    result = parser(doc)
    result.add_argument("--tokenizer", type=Path, required=True, help="its folder")
    result.add_argument(
        "--data", action="append", default=[], metavar="NAME=PATH", help="repeated"
    )
    return result


def parse_rows(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of such a stage."""
    return parse(rows_parser(doc), argv)


def named_paths(values: list[str]) -> dict[str, list[Path]]:
    """`NAME=PATH` flags as {name: paths}, both in the order given.

    Raises RecipeError where a value has no `=`.
    """
    result: dict[str, list[Path]] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals:
            raise RecipeError(value, "not of the form NAME=PATH")
        result.setdefault(name, []).append(Path(path))
    return result


def load_recipe(path: Path, model: type[Recipe]) -> Recipe:
    """The recipe in a YAML file, validated.

    Raises RecipeError with the file and key.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    # else it looks for some in all that is installed
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        return model.model_validate(YAML(typ="safe").load(path) or {})
    except (OSError, YAMLError) as error:
        raise RecipeError(str(path), f"cannot be read: {error}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{path} {key}", first["msg"]) from error


def run(main: Callable[[], int], at_once: bool = False) -> None:
    """Run a stage's main and exit; a user's mistake is shown without a traceback.

    `at_once`: end without Python's own end, which frees tokenizers word by word.
    """
    gc.freeze()  # what was imported stays: no collection has to look at it
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(
            f"error: the disk is full: {error}\n\nhint: free some space where --out and "
            "--work are, and run again",
            file=sys.stderr,
            flush=True,
        )
        code = 1
    except KeyboardInterrupt:
        code = 130
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
