"""`python -m experiments`: lists the experiments, runs one, or prints the table of a run."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from experiments import EXPERIMENTS, TOOLS
from experiments.errors import REPORTED, InputError, brief, pick
from experiments.launch import command, in_the_way
from experiments.memory import keep_memory


def listing() -> str:
    """The text that `python -m experiments` prints."""
    width = max(map(len, EXPERIMENTS | TOOLS))

    def lines(entries: Mapping[str, tuple[str, str, str]]) -> list[str]:
        return [f"  {name:{width}}  {what} ({time})" for name, (_, what, time) in entries.items()]
    return "\n".join([f"usage: {command()} NAME [options]", "", "experiments (usual time on two cores):",
                      *lines(EXPERIMENTS), "", "tools:", *lines(TOOLS), "",
                      f"{command()} NAME --help lists the options of one."])


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises what is wrong as an InputError of one line, numbers explained in words."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, _whole)
        self.register("type", float, _number)

    def error(self, message: str) -> NoReturn:
        words = " ".join(message.split())
        raise InputError(f"{words if len(words) < 400 else words[:400] + ' ...'}; {self.prog} --help lists the options")


def _whole(text: str) -> int:
    try: return int(text)
    except ValueError: raise argparse.ArgumentTypeError(f"{brief(text)} is no whole number") from None


def _number(text: str) -> float:
    try: return float(text)
    except ValueError: raise argparse.ArgumentTypeError(f"{brief(text)} is no number") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`.

    The exit status: 0, 1 (outside its tolerance, or an arm was lost), 2 (bad input, or a disk or memory that is full),
    130 (Ctrl-C), 141 (nobody reads the output any more).
    """
    if argv is None:
        keep_memory()       # the process is ours
        argv = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):     # a name that the terminal's letters lack is no reason to stop
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="backslashreplace")
    if problem := in_the_way("norms", "runner"): return _refused(problem)       # before anything imports them
    if "TORCHELASTIC_RUN_ID" not in os.environ: return run(argv)
    from experiments.study.torchrun import ended, help_out, is_helper
    if is_helper(): return help_out()       # to rank 0's studies
    try: return run(argv)
    finally: ended()


def run(argv: Sequence[str]) -> int:
    """`main` in the process that runs the command."""
    try:
        status = _run(argv)
        if sys.stdout is not None: sys.stdout.flush()
        return status
    except InputError as e: return _refused(str(e))
    except KeyboardInterrupt as e:
        if REPORTED not in e.args: _say("\nInterrupted: nothing was kept.")
        return 130
    except BrokenPipeError:
        _leave_output()
        return 141
    except MemoryError: return _refused(NO_MEMORY)
    except OSError as e:
        where = f"{os.fspath(e.filename)!r} can't be read or written" if e.filename else "the output can't be written"
        if not e.filename: _leave_output()      # what has a name says it
        return _refused(f"{where}: {e.strerror or e}; make room, or name another place")
    except RuntimeError as e:       # torch's, of a CPU and of a GPU
        if "allocate memory" in str(e) or type(e).__name__ == "OutOfMemoryError": return _refused(NO_MEMORY)
        raise


NO_MEMORY = "the memory does not suffice; take less at once (smaller batches, fewer images or seeds)"


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(listing(), flush=True)
        return 0
    known = EXPERIMENTS | TOOLS
    name = pick(argv[0], known, "experiment")
    module = importlib.import_module(known[name][0])
    status: int = module.main(parser(name, module).parse_args(argv[1:]))
    return status


def parser(name: str, module: Any) -> Parser:
    """The parser of the command called `name`, whose module is `module`."""
    made = Parser(f"{command()} {name}", description=module.__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(made)
    return made


def _refused(text: str) -> int:
    _say(f"error: {text}")
    return 2


def _say(text: str) -> None:
    """Print to standard error, if anybody reads it."""
    try: print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError): pass


def _leave_output() -> None:
    """Let what is left in the output's buffer go nowhere, or Python complains once more at its exit."""
    try: os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError): pass


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # all is said: what is left is Python's own end
    sys.exit(status)
