"""Checks what pip cannot install: a recent Python with venv, a C++ compiler and Python's headers.

    python3 tools/check_toolchain.py

Runs before any dependency is there. DeepSpeed compiles a small operator when the first processes start; without a
compiler or headers they would all die minutes later, with a message that names neither.
"""

import argparse
import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path


def missing_tools() -> list[str]:
    """Return one line per missing tool: what it is, what needs it, and how to get it on Debian."""
    missing = []
    if sys.version_info < (3, 11):
        version = sys.version.split()[0]
        missing.append(f"Python 3.11, for the versions of constraints.txt: this is {version}; add PYTHON=python3.11")
    if importlib.util.find_spec("ensurepip") is None:
        missing.append("Python's venv with pip, for .venv: apt-get install python3-venv")
    if shutil.which("g++") is None:
        missing.append("the compiler g++, for DeepSpeed's first start: apt-get install g++")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("Python's headers (Python.h), for DeepSpeed's first start: apt-get install python3-dev")
    return missing


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if lines := missing_tools():
        sys.exit("Something is missing on this machine:\n" + "\n".join(f"  - {line}" for line in lines))
