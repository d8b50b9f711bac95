"""How the command line was started: under which name, and whether Python finds this project's packages.

`python -m` puts the current folder first on Python's search path. A `runner.py` or a `norms/` of the user's own is
imported from there in the place of this project's. The command `runnernorms` doesn't look into the current folder.

Imports the standard library alone: it runs before the packages are imported. `python -m nbdev_style` runs this file by
its path, for `experiments` may be what lies in the way.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from importlib.machinery import ModuleSpec
from pathlib import Path

SCRIPT = "runnernorms"
HOME = Path(__file__).resolve().parent.parent       # the folder that holds the packages


def command() -> str:
    """What the user has typed before the experiment's name: `runnernorms` or `python -m experiments`."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m experiments"


def in_the_way(*packages: str, script: str | None = SCRIPT) -> str | None:
    """The error's text for the first of `packages` that Python would import from elsewhere than beside this one.

    It names the file and the mend, `script` included: a command that does the same and doesn't look into the current
    folder. None: all of the packages are this project's. Nothing is imported to find out, so a file that is broken, or
    does something when it is imported, does no harm.
    """
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None:
            return (f"there is no package {name!r} in {HOME}, where this project's packages are: "
                    "install the whole project again")
        found = _place(spec)
        if HOME / name not in (found, found.resolve()): return _text(name, found, script)
    return None


def _place(spec: ModuleSpec) -> Path:
    """The file of a module; the folder of a package, also of one without `__init__.py`."""
    if spec.submodule_search_locations: return Path(os.path.abspath(next(iter(spec.submodule_search_locations))))
    return Path(os.path.abspath(spec.origin or spec.name))


def _text(name: str, found: Path, script: str | None) -> str:
    """The error's text where `found` is what Python takes for the package `name`."""
    got = f"{found} is in the way: Python takes it for this project's package {name!r}, which is {HOME / name}. "
    folder = found.parent
    if str(folder) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return f"{got}Uninstall what has brought it, or install this project into an environment of its own"
    if Path(sys.path[0]).resolve() != folder.resolve():
        return f"{got}Rename it, or take {folder} off Python's search path (PYTHONPATH)"
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    if not script or not shutil.which(script, path=places): return f"{got}Rename it, or start from another folder"
    return f"{got}Rename it, start from another folder, or use `{script}`, which doesn't look into the current folder"
