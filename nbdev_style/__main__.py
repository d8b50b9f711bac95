"""Execute the lessons from scratch, clean them and export their modules: `python -m nbdev_style [NAME ...]`."""

import argparse
import subprocess
import sys
from pathlib import Path

from execnb.shell import CaptureShell
from fastcore.nbio import read_nb, write_nb
from nbdev.clean import clean_nb
from nbdev.export import nb_export

HERE = Path(__file__).parent

# One thread, so that sums don't depend on the machine's cores; small pictures, which keep a notebook under 1 MB.
SETUP = """
import matplotlib.pyplot, torch
matplotlib.pyplot.rcParams["figure.dpi"] = 70
torch.set_num_threads(1)
del matplotlib, torch
"""


def execute(path, into):
    """Run the notebook `path` in a new shell and write it, with its outputs and clean, into the folder `into`.

    Raises:
        SystemExit: a cell raised an exception; its text is the cell's number and traceback, and nothing is written.
    """
    notebook, shell = read_nb(path), CaptureShell(mpl_format="png")
    shell.run(SETUP)
    try: shell.run_all(notebook, exc_stop=True)
    except Exception: sys.exit(shell.prettytb(path.name))
    finally: shell.close()
    clean_nb(notebook)
    write_nb(notebook, into / path.name)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nbdev_style", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a notebook, such as 05_runner (default: all)")
    parser.add_argument("--into", type=Path, default=HERE, metavar="FOLDER",
                        help="where notebooks and modules are written (default: in place)")
    args = parser.parse_args(argv)
    known = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    names = args.names or list(known)
    for name in names:
        if name not in known: parser.error(f"there is no lesson {name!r}; choose from: {', '.join(known)}")
    if len(names) == 1:
        path = known[names[0]]
        execute(path, args.into)
        nb_export(args.into / path.name, args.into)
        print(f"{path.stem}: executed", flush=True)
    else:       # each in a process of its own, which has nothing left of the one before
        for name in names:
            done = subprocess.run([sys.executable, "-m", "nbdev_style", name, "--into", args.into])
            if done.returncode: sys.exit(done.returncode)


if __name__ == "__main__": main()
