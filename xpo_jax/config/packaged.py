"""The files of the packaged configs, by name: `--config=paraphrase`, in a clone and where a wheel is installed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from xpo_jax import configs
from xpo_jax.config.schema import ConfigError


def folder() -> Path:
    """Return the folder of the packaged configs."""
    return Path(configs.__path__[-1])


def names() -> list[str]:
    """Return the names of the packaged configs, sorted."""
    return sorted(path.stem for path in folder().glob("*.py") if path.stem != "__init__")


def summaries() -> dict[str, str]:
    """Return the first line of each packaged config's docstring, by name."""
    docstrings = {
        name: ast.get_docstring(ast.parse((folder() / f"{name}.py").read_text(encoding="utf-8")))
        for name in names()
    }
    return {name: (text or "").partition("\n")[0] for name, text in docstrings.items()}


def is_name(spec: str) -> bool:
    """Return whether `spec` is a bare name, or a name and an argument: neither a path nor a file with a suffix."""
    return re.match(r"[\w-]+(:|$)", spec) is not None


def file(name: str) -> str:
    """Return the path of a packaged config.

    Raises:
      ConfigError: no packaged config has this name, or a different file of this name is in the current directory.
    """
    here, path = Path(f"{name}.py"), folder() / f"{name}.py"
    if name not in names():
        remedy = "a file of your own ends with .py or .json"
        if here.is_file():
            remedy = f"for {here} in this directory write --config={here}"
        raise ConfigError(
            f"{name}: no packaged config has this name; there are {', '.join(names())}; {remedy}"
        )
    if here.is_file() and not here.samefile(path):
        raise ConfigError(
            f"{name}: names a packaged config, but {here} is in this directory as well; write --config={here} for that"
            f" file, or --config={path} for the packaged one"
        )
    return str(path)
