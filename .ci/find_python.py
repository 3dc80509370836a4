"""Print the path of a Python interpreter that can create environments, from PATH or pyenv.

python .ci/find_python.py 3.10          this minor version
python .ci/find_python.py newest        the newest version, 3.10 or newer
python .ci/find_python.py newest-other  the newest with another minor version than this interpreter
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
    """Return the paths of the interpreters on PATH, then of those of pyenv, if it is installed."""
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
    """Return the output of a command, "" if the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return ""
    if done.returncode != 0:
        return ""
    return done.stdout


def usable() -> dict[tuple[int, int], str]:
    """Return the first interpreter of each version that can create environments."""
    found: dict[tuple[int, int], str] = {}
    for path in candidates():
        numbers = output([path, "-c", PROBE]).split()
        version = tuple(map(int, numbers))
        if len(version) == 2 and version >= OLDEST:
            found.setdefault(version, path)
    return found


def main() -> None:
    """Print the path. Exit with one line and code 1 if there is none."""
    wanted = sys.argv[1]
    found = usable()
    versions = set(found)
    if wanted == "newest-other":
        versions.discard(sys.version_info[:2])
    elif wanted != "newest":
        versions &= {tuple(map(int, wanted.split(".")))}
    if not versions:
        sys.exit(f"no Python ({wanted}) with the modules venv and ensurepip on PATH or in pyenv")
    print(found[max(versions)])


if __name__ == "__main__":
    main()
