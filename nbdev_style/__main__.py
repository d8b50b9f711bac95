"""Execute the lessons from scratch, clean them and export their modules: `python -m nbdev_style [NAME ...]`.

In a checkout they are written in place, of an installed package into the current folder. Needs nbdev, and takes some
ten minutes on all of MNIST's images; NORMS_LESSON_IMAGES=1000 in the environment takes fewer.
"""

import argparse
import runpy
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HOME = HERE.parent                                  # the folder that holds the packages
IN_PLACE = (HOME / "pyproject.toml").is_file()      # else these are the files that pip has installed
NBDEV = "nbdev>=3.3,<4"     # as in pyproject.toml

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
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb
    notebook, shell = read_nb(path), CaptureShell(mpl_format="png")
    shell.run(SETUP)
    try: shell.run_all(notebook, exc_stop=True)
    except Exception: sys.exit(shell.prettytb(path.name))
    finally: shell.close()
    clean_nb(notebook)
    write_nb(notebook, into / path.name)


def problem(into):
    """Why the lessons can't be executed, in words with the mend; None if they can."""
    in_the_way = runpy.run_path(str(HOME / "experiments" / "launch.py"))["in_the_way"]
    if text := in_the_way("experiments", "norms", "runner", script=None): return text
    try:
        import nbdev.export  # noqa: F401
    except ImportError as e: return f"nbdev executes the lessons and can't be imported ({e}): pip install '{NBDEV}'"
    if not any(HERE.glob("*.ipynb")): return f"there are no notebooks in {HERE}: install the project again, or clone it"
    try: into.mkdir(parents=True, exist_ok=True)
    except OSError as e: return f"the folder {into} can't be made ({e.strerror}): name another by --into FOLDER"
    return None


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nbdev_style", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a notebook, such as 05_runner (default: all)")
    parser.add_argument("--into", type=Path, default=HERE if IN_PLACE else Path(), metavar="FOLDER",
                        help="where notebooks and modules are written (default: "
                             f"{'in place' if IN_PLACE else 'the current folder'})")
    args = parser.parse_args(argv)
    if text := problem(args.into): parser.error(text)
    known = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    names = args.names or list(known)
    for name in names:
        if name not in known: parser.error(f"there is no lesson {name!r}; choose from: {', '.join(known)}")
    if len(names) == 1:
        from nbdev.export import nb_export
        path = known[names[0]]
        execute(path, args.into)
        nb_export(args.into / path.name, args.into)
        print(f"{path.stem}: executed", flush=True)
    else:       # each in a process of its own, which has nothing left of the one before
        for name in names:
            done = subprocess.run([sys.executable, "-m", "nbdev_style", name, "--into", args.into])
            if done.returncode: sys.exit(done.returncode)


if __name__ == "__main__": main()
