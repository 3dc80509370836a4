"""Print the path of a Python interpreter that can make environments, found on PATH or by pyenv.

python .ci/find_python.py 3.10          this minor version
python .ci/find_python.py newest        the newest, of 3.10 on
python .ci/find_python.py newest-other  the newest whose minor version is not that of this one
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 10)
PROBE = (
    "import ensurepip, sys, sysconfig; v = sys.version_info; "
    "assert v.releaselevel == 'final' and not sysconfig.get_config_var('Py_GIL_DISABLED'); "
    "print('%d %d' % (v[0], v[1]))"
)


def candidates() -> list[str]:
    """Return the interpreters of PATH, then those of pyenv, if there is one."""
    found = []
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if os.path.isdir(folder):
            names = [name for name in os.listdir(folder) if re.fullmatch(r"python3(\.\d+)?", name)]
            found += [os.path.join(folder, name) for name in sorted(names)]
    if shutil.which("pyenv"):
        root = Path(output(["pyenv", "root"]).strip())
        versions = output(["pyenv", "versions", "--bare"]).split()
        found += [str(root / "versions" / version / "bin" / "python") for version in versions]
    return found


def output(command: list[str]) -> str:
    """Return what a command prints, "" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def usable() -> dict[tuple[int, int], str]:
    """Return the interpreters by version, the first of each; those that cannot make environments are left out."""
    found: dict[tuple[int, int], str] = {}
    for path in candidates():
        numbers = output([path, "-c", PROBE]).split()
        version = tuple(map(int, numbers))
        if len(version) == 2 and version >= OLDEST:
            found.setdefault(version, path)
    return found


def main() -> None:
    """Print the path. Exit with one line and code 1 if there is none."""
    wanted, found = sys.argv[1], usable()
    if wanted == "newest-other":
        found = {
            version: path for version, path in found.items() if version != sys.version_info[:2]
        }
    if not wanted.startswith("newest"):
        version = tuple(map(int, wanted.split(".")))
        found = {version: found[version]} if version in found else {}
    if not found:
        sys.exit(f"no Python ({wanted}) with the modules venv and ensurepip on PATH or in pyenv")
    print(found[max(found)])


if __name__ == "__main__":
    main()
