"""`python -m experiments`: lists the experiments, runs one, or prints the table of a run."""

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from experiments import EXPERIMENTS, TOOLS
from experiments.errors import InputError, pick
from experiments.launch import command, in_the_way


def listing() -> str:
    """The text that `python -m experiments` prints."""
    width = max(map(len, EXPERIMENTS | TOOLS))

    def lines(entries: Mapping[str, tuple[str, str, str]]) -> list[str]:
        return [f"  {name:{width}}  {what} ({time})" for name, (_, what, time) in entries.items()]
    return "\n".join([f"usage: {command()} NAME [options]", "", "experiments (usual time on two cores):",
                      *lines(EXPERIMENTS), "", "tools:", *lines(TOOLS), "",
                      f"{command()} NAME --help lists the options of one."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; the exit status: 0, 1 (outside its tolerance), 2 (bad input), 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    if problem := in_the_way("norms", "runner"):        # before anything imports them
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if "TORCHELASTIC_RUN_ID" not in os.environ: return run(argv)
    from experiments.study.torchrun import ended, help_out, is_helper
    if is_helper(): return help_out()       # to rank 0's studies
    try: return run(argv)
    finally: ended()


def run(argv: Sequence[str]) -> int:
    """`main` in the process that runs the command."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(listing(), flush=True)
            return 0
        known = EXPERIMENTS | TOOLS
        name = pick(argv[0], known, "experiment")
        module = importlib.import_module(known[name][0])
        parser = argparse.ArgumentParser(f"{command()} {name}", description=module.__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(parser)
        status: int = module.main(parser.parse_args(argv[1:]))
        return status
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        if not e.args: print("\nInterrupted: nothing was kept.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        return 141


if __name__ == "__main__": sys.exit(main())
