"""New processes of Python that have imported torch already: forked from one that has, which saves seconds for each."""

import atexit
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path


class Forks:
    """A process that has imported `modules`; `run` is `subprocess.run([sys.executable, *args])`, forked from it.

    What a module reads from the environment when it is imported is what this process had at the start.
    """

    def __init__(self, *modules):
        self.modules, self.process = modules, None

    def run(self, *args, cwd=None, env=None):
        """Run `-c CODE` or `-m MODULE`, with arguments, to its end; its exit status, output and errors."""
        env = dict(os.environ if env is None else env)
        if not hasattr(os, "fork"):
            return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__, *self.modules], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, text=True, env=os.environ | {
                                                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent),
                                                                               os.environ.get("PYTHONPATH", "")])})
        with tempfile.TemporaryDirectory() as folder:
            out, err = os.path.join(folder, "out"), os.path.join(folder, "err")
            print(json.dumps([args, str(cwd or os.getcwd()), env, out, err]), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(args, code, Path(out).read_text(), Path(err).read_text())

    def close(self):
        if self.process is not None: self.process.communicate()     # at the end of its input it ends
        self.process = None


def serve(*modules):
    for module in modules: importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")                             # of no process that is forked
    for line in sys.stdin:
        pid = os.fork()
        if not pid: become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def become(args, cwd, env, out, err):
    """Be what the command line `args` starts, until its end."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate((os.devnull, out, err)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.path[:1] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]     # [0] was this file's folder
    (kind, what, *rest), code = args, 0
    sys.argv = [kind, *rest]
    try:
        if kind == "-m": runpy.run_module(what, run_name="__main__", alter_sys=True)
        else: exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str): code = print(code, file=sys.stderr) or 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__": serve(*sys.argv[1:])
