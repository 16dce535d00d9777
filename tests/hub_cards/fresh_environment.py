# SPDX-License-Identifier: Apache-2.0
"""A virtual environment with the packages of this one, but without this project: a new user's machine.

Nothing is installed: its site-packages points to a folder of links to the packages of the environment that runs the
tests. A package without a link does not exist, neither for `import` nor for `importlib.metadata`.
"""

import subprocess
import sysconfig
import venv
from pathlib import Path


PROJECT = ("modeling_camoe", "camoe_search", "camoe", "__editable__")


def make_environment(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """Make it; returns its interpreter. Packages whose names start with one of `without` are missing, too."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if not entry.name.startswith((*PROJECT, *without)) and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-I", "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "packages.pth").write_text(f"{packages}\n")
    return python
