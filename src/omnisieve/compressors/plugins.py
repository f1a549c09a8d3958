"""Methods from Python files outside the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from omnisieve.compressors.base import CompressorError, list_compressors


def load_plugin(path: str | Path) -> None:
    """Run a Python file, so that the methods it registers are known by name; a second time nothing happens.

    Raises:
        CompressorError: there is no such file, it registers nothing, or a name that is taken.
    """
    file = Path(path).resolve()
    # A name that no other module has, whatever the file is called.
    name = f"omnisieve plugin {file}"
    if name in sys.modules:
        return
    if not file.is_file():
        raise CompressorError(f"plugins: {path} is no file; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise CompressorError(f"plugins: {path} is no Python file; its name must end in .py")
    before = list_compressors()
    # Dataclasses look their module up while it runs.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if list_compressors() == before:
            raise CompressorError(f'plugins: {path} registers no method; decorate its class with @register("name")')
    except BaseException:
        del sys.modules[name]
        raise
