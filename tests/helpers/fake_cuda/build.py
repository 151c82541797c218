"""Compiles `guard.cpp`."""

import shutil
import subprocess
from pathlib import Path

from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

SOURCE = Path(__file__).parent / "guard.cpp"


def find_compiler() -> str | None:
    """Returns the path of the C++ compiler that torch would use, if it is installed."""
    return shutil.which(get_cxx_compiler())


def build_guard(compiler: str, folder: Path) -> Path:
    """Compiles the shared library into a folder, and returns its path."""
    library = folder / "guard.so"
    command: list[str | Path] = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", SOURCE, "-o", library]
    command += [f"-I{path}" for path in include_paths()]
    command += [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]  # found without torch
    done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library
