"""The command line takes any input: what is bad is one line and exit status 2, in every command, and no traceback."""

import argparse
import copy
import functools
import importlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import EXPERIMENTS, TOOLS, data, spoken
from experiments.__main__ import main, parser
from experiments.study.display import Display
from runner import console
from runner.compiled import CompileError

ROOT = Path(__file__).parent.parent
COMMANDS = EXPERIMENTS | TOOLS
TINY = {"data": ["digits"], "limit": ["8"], "seeds": ["1"]}     # what a command gets that would go on


@functools.cache
def parser_of(name): return parser(name, importlib.import_module(COMMANDS[name][0]))


def options_of(name):
    """The options of a command that take a value: `{name without dashes: action}`."""
    return {a.option_strings[-1][2:]: a for a in parser_of(name)._actions
            if a.option_strings and a.nargs != 0 and not isinstance(a, argparse.BooleanOptionalAction)}


def known_options(name): return {o for a in parser_of(name)._actions for o in a.option_strings}


def named(text): return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


# --- bad values ---------------------------------------------------------------------------------------------------

INTEGERS = ["0", "-1", "1.5", "nan", "inf", "", "x", "1e3", "-0", "9" * 30, "9" * 5000, "2147483648000", "0x10", "--1"]
NUMBERS = ["0", "-1", "nan", "inf", "-inf", "1e39", "3.5e38", "1e308", "1e400", "1e-60", "-1e-60", "", "x", "1,5"]
SEEDS = ["0", "-1", "1.5", "x", ",", "", "1,1", "-1,", "4294967296,", "9" * 5000, "1e3", "nan"]
WORDS = ["", "x", "digit\ns", "-", "é", "\udcff", "0", "none" * 60, "auto "]
BAD = {"data": ["minst", "x" * 5000, "folder:", "folder:nowhere", "/"], "data-dir": ["nowhere", "\udcff"],
       "device": ["gpu", "mps", "xpu", "meta", "cuda:-1", "cuda:99999999999999999999", "cpu:1", "CUDA:", "hpu:0", ""],
       "out": [""], "scheduler": ["tcp://nowhere:1"], "seeds": SEEDS, "seconds": NUMBERS,
       "tune-seeds": [*INTEGERS[2:8], "-1", "4294967296"]}
FREE = {"name", "into"}         # of `table`, which has its own test


def bad_values(option, action):
    """Values of an option that make no sense."""
    if option in BAD: return BAD[option]
    if action.type is int: return INTEGERS
    return NUMBERS if action.type is float else WORDS


def some(rng, values, n): return rng.sample(values, min(n, len(values)))


def one_line(argv, capsys, lines=1):
    """Run a command that is refused; what it says, in so many lines (None: any number, of places that were searched).
    """
    try: status = main(argv)
    except BaseException as e: pytest.fail(f"{argv}: {type(e).__name__}: {e}")
    out, err = capsys.readouterr()
    assert status == 2, argv
    assert err.startswith("error: "), argv
    assert err.count("\n") == lines or lines is None, argv
    assert len(err) < 1500, argv
    assert "Traceback" not in out + err, argv
    if argv[0] in COMMANDS: assert named(err.replace(" ".join(argv), "")) <= (
        known_options(argv[0]) | {a.partition("=")[0] for a in argv}), argv
    return err


digits = functools.cache(data._digits)      # which takes longer than most of these commands


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Another folder, and nothing that would be trained or timed."""
    def goes_on(*args, **kwargs): pytest.fail("this was not refused")
    for name in ("study.study.Study.run", "inside.look", "bench._timed", "convolutions.measure"):
        monkeypatch.setattr(f"experiments.{name}", goes_on)
    monkeypatch.setattr("experiments.data._digits", digits)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "table"])
def test_any_bad_value_of_any_option_is_one_line_and_status_2(name, tmp_path, capsys):
    options, rng = options_of(name), random.Random(name)
    cases = [(option, value) for option, action in options.items() if option not in FREE
             for value in some(rng, bad_values(option, action), 5)]
    if "data-dir" in options: cases = [(o, v) for o, v in cases if o != "data-dir"]     # the digits need none
    for option, value in cases:
        given = {k: v for k, v in TINY.items() if k in options and k != option}
        if name == "convolutions": given["seconds"] = ["0.001"] * (option != "seconds")
        argv = [name, *(f"--{k}={v[0]}" for k, v in given.items() if v), f"--{option}={value}"]
        one_line(argv, capsys)
        assert not [*tmp_path.rglob("*.json")], argv


def test_random_command_lines_are_refused_in_words(capsys):
    rng = random.Random(21)
    for _ in range(60):
        name = rng.choice([n for n in COMMANDS if n != "table"])
        options = options_of(name)
        argv = [name]
        for option in rng.sample(list(options), min(len(options), rng.randint(1, 4))):
            values = bad_values(option, options[option])
            argv += [f"--{option}", *rng.sample(values, min(len(values), rng.randint(1, 2)))]
        argv += rng.sample(["--nonsense", "-x", "stray", "--out", "--data=minst", "--jobs=none"], rng.randint(1, 3))
        rest = argv[1:]
        rng.shuffle(rest)
        if not {"-h", "--help"} & set(rest): one_line([name, *rest, "--nonsense"], capsys)


@pytest.mark.parametrize("argv", [["smal-batch"], [""], ["x" * 10_000], ["--nonsense"], ["a\nb"], ["\udcff"],
                                  ["table"], ["table", ""], ["table", "\udcff"], ["bench", "nothing"],
                                  ["bench", "norms", "--repetitions", "-3"], ["small-batch", "--jobs"],
                                  ["small-batch", "--recipe", "best", "--lr", "1"], ["small-batch", "--resume"]])
def test_other_bad_command_lines(argv, capsys): one_line(argv, capsys)


@pytest.mark.parametrize(("named", "says"), [("0", "NORMS_JOBS is '0'"), ("9" * 5000, "or give --jobs"), ("²", "²")])
def test_a_bad_number_of_jobs_in_the_environment(named, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NORMS_JOBS", named)
    argv = ["small-batch", "--data", "digits", "--limit", "8", "--out", str(tmp_path / "run")]
    assert says in one_line(argv, capsys)


# --- what advice names --------------------------------------------------------------------------------------------

def test_help_names_only_options_that_the_command_has():
    foreign = {"small-batch": {"--nproc-per-node"}}
    for name in COMMANDS:
        assert named(parser_of(name).format_help()) <= known_options(name) | foreign.get(name, set()) | (
            {"--steps"} if name == "dying" else set()), name


def test_errors_name_only_options_that_the_command_has(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("NORMS_JOBS", "none")
    (tmp_path / "file").write_text("")
    for name in COMMANDS:
        if name == "table": continue
        known = known_options(name)
        cases = [["--resume"], ["--out", "file"], ["--out", "file/run"], ["--data", "mnist"], ["--limit", "1"],
                 ["--data-dir", "nowhere", "--data", "mnist"], ["--data", "folder:nowhere"], ["--data", "folder:file"],
                 ["--scheduler", "tcp://x"], ["--jobs", "0"], ["--device", "mps"]]
        for case in cases:
            option = case[0].partition("=")[0]
            if option not in known or (name == "bench" and "mnist" in case): continue    # its parts load
            argv = [name, *case]
            if option not in ("--data", "--data-dir") and "--data" in known: argv += ["--data", "digits"]
            one_line(argv, capsys, lines=None)


def test_a_study_s_words_are_those_of_options():
    """Every message of the study that names an argument of Python's has an option for it."""
    text = "\n".join(p.read_text() for p in (ROOT / "experiments" / "study").glob("*.py"))
    messages = re.findall(r"raise \w+\((?:[^()]|\([^()]*\))*\)", text)
    assert len(messages) > 30
    go_on = "The same command with --out runs/x --resume goes on."
    said = [spoken.in_options(re.sub(r'"\s*f?"', "", m), go_on) for m in messages]
    of_clusters = {"--nproc-per-node", "--nthreads", "--nworkers", "--head", "--address"}
    options = known_options("small-batch") | of_clusters
    for message in said:
        assert named(message) <= options
    assert spoken.in_options("name another folder by out=, or give backend='loky'; and run() goes on with what is "
                             "missing", go_on) == (
        "name another folder by --out, or give --backend loky; and the same command with --out runs/x --resume goes "
        "on")


# --- width, letters, pipes, signals -------------------------------------------------------------------------------

def test_lines_fit_the_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    with Display("small-batch", 123, 4, lambda: 2) as display:
        display.done("failed")
        display.say(spoken.line("norm", {"norm": "RunningBatchNorm", "seed": 11, "status": "ok", "train_loss": 0.123456,
                                         "valid_loss": 0.1234567, "valid_accuracy": 0.98765},
                                {"status": "failed", "seconds": 1234.5, "error": "Expected more than 1 value per "
                                 "channel when training"}, lambda row: "gamma of the first norm: " + "1.234 " * 12))
    print(spoken.fits("data:    digits (scikit-learn, 8x8 resized): 1,197 training, 300 validation and 300 test"))
    print(spoken.table_text(["norm", "valid accuracy", "95 % interval"],
                            [["RunningBatchNorm", "0.9500", "0.823 to 1.077"], ["none", "0.1", "-"]]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert "  valid accuracy 0.9500" in lines
    assert "RunningBatchNorm" in lines
    monkeypatch.delenv("COLUMNS")
    long = "word " * 60
    assert spoken.fits(long) == long


def test_letters_that_the_terminal_lacks_a_full_disk_and_no_output_are_no_traceback():
    def started(argv, **env):
        return subprocess.Popen(f"{sys.executable} -m experiments {argv}", cwd=ROOT, shell=True, text=True,
                                stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **env})
    ran = [started("Läufe", PYTHONIOENCODING="ascii", PYTHONUTF8="0"), started("> /dev/full"), started(">&- 2>&-"),
           started("| head -1")]
    said = [p.communicate(timeout=120) for p in ran]
    assert [p.returncode for p in ran] == [2, 2, 0, 0]
    assert r"unknown experiment 'L\xe4ufe'" in said[0][1]
    assert said[1][1] == ("error: the output can't be written: No space left on device; make room, or name another "
                          "place\n")
    assert said[2] == ("", "")
    assert said[3][1] == ""


def test_a_width_that_is_none_and_letters_that_are_not_there(monkeypatch):
    for told in ("9" * 5000, "-1", "x", "0", ""):
        monkeypatch.setenv("COLUMNS", told)
        assert console.columns() is None
    for encoding, has in (("utf-8", True), ("ascii", False), ("cp437", True), ("latin-1", False), (None, True)):
        monkeypatch.setattr(sys, "stdout", argparse.Namespace(encoding=encoding))
        assert console.encodes("█") is has


def test_a_reader_who_leaves_while_a_study_waits_is_no_traceback(monkeypatch, capsys):
    class Gone:
        def write(self, text): raise BrokenPipeError
    monkeypatch.setattr("experiments.study.display.EVERY", 0.001)
    monkeypatch.setattr(threading, "excepthook", lambda args: pytest.fail(str(args.exc_value)))
    display = Display("small", 3, 0, lambda: 1)
    display.__enter__()
    display.out = Gone()
    time.sleep(0.05)
    with pytest.raises(BrokenPipeError): display.say("text")
    assert not display._thread.is_alive()


def test_ctrl_c_on_any_line_is_no_traceback_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EXPERIMENTS, "small", ("small_experiment", "", ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")          # in this process
    monkeypatch.setattr("os.fsync", lambda fd: None)
    left = 0

    def on_line(frame, event, arg):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0: raise KeyboardInterrupt
        return on_line

    def on_call(frame, event, arg):
        file = frame.f_code.co_filename
        return on_line if "/experiments/" in file and not file.endswith("__main__.py") else None

    def run(out, at):
        nonlocal left
        left = at
        sys.settrace(on_call)
        try: return main(["small", "--out", out, "--resume"])
        finally: sys.settrace(None)
    assert run("whole", 10**9) == 0
    lines, rng = 10**9 - left, random.Random(5)
    files = {p.name for p in Path("whole").rglob("*.*")}
    for i, at in enumerate(sorted(rng.sample(range(1, lines), 15))):
        capsys.readouterr()
        status, (out, err) = run(f"{i}", at), capsys.readouterr()
        assert status in (130, 0), at           # what a study's own thread or a `with suppress` hears is lost
        assert "Traceback" not in out + err, at
        assert status == 0 or "Interrupted" in out + err, at
        assert not [*Path(f"{i}").rglob("*.part")], at
        assert main(["small", "--out", f"{i}", "--resume"]) == 0, at
        assert {p.name for p in Path(f"{i}").rglob("*.*")} == files, at


# --- tables of what can't be compared -----------------------------------------------------------------------------

def recorded(folder, config=(), **changes):
    """A run folder of `small-batch` with one row, and what its `config.json` says."""
    row = {"norm": "none", "batch_size": 2, "lr": 0.4, "epochs": 1, "seed": 0, "valid_accuracy": 0.5, "valid_loss": 1.0,
           "seconds": 1.0, "status": "ok", "parameters": 10} | changes.pop("row", {})
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({
        "experiment": "small-batch", "data": "MNIST", "train_images": 100, "valid_images": 50, "complete": True,
        "verdict": "", "rows": [row]} | changes))
    said = {"config": {"lr": 0.4, "device": "cpu", "seeds": [0], "out": None, "batch_size": 2}, "data": "MNIST: 100",
            "threads": 1, "versions": {"torch": "2.14", "runnernorms": "1", "machine": "a"}}
    for path, value in dict(config).items():
        *outer, last = path.split(".")
        at = said
        for name in outer: at = at[name]
        at[last] = value
    if config is not None: (folder / "config.json").write_text(json.dumps(said))
    return str(folder)


@pytest.mark.parametrize(("config", "changes", "says"), [
    ({"config.device": "cuda"}, {}, "device 'cpu' and 'cuda'"), ({"config.lr": 0.1}, {}, "lr 0.4 and 0.1"),
    ({"versions.torch": "2.15"}, {}, "torch version '2.14' and '2.15'"), ({"threads": 2}, {}, "threads 1 and 2"),
    ({"versions.machine": "b"}, {}, "machine 'a' and 'b'"), ({"data": "MNIST: other"}, {}, "data 'MNIST: 100' and"),
    ({"config.net": "resnet"}, {}, "net None and 'resnet'"), ({}, {"data": "digits"}, "of different data"),
    ({}, {"train_images": 99}, "of different data"),
    ({}, {"valid_images": 49}, "different validation images, [49, 50]"),
    ({}, {"experiment": "lenet"}, "of different experiments"), ({}, {"row": {"lr": 0.1}}, "lr 0.4 and 0.1"),
    ({}, {"row": {"parameters": 11}}, "parameters 10 and 11"), ({}, {"row": {"seed": 0}}, "with seed 0 twice"),
    ({}, {"row": {"norm": "GroupNorm", "epochs": 2}}, "none and GroupNorm are of different settings"),
    ({"versions": None}, {}, "is no record of a run's settings"),
    ({"config": 3}, {}, "is no record of a run's settings")])
def test_a_table_of_runs_made_in_different_ways_is_refused(config, changes, says, tmp_path, capsys):
    other = {"seed": 1} | changes.pop("row", {})
    runs = recorded(tmp_path / "a"), recorded(tmp_path / "b", config, row=other, **changes)
    assert says in one_line(["table", *runs], capsys)


def test_a_table_of_runs_made_alike_is_one(tmp_path, capsys):
    runs = [recorded(tmp_path / f"{i}", {"config.seeds": [i], "config.out": f"{i}", "config.jobs": i},
                     row={"seed": i}) for i in range(3)]
    assert main(["table", *runs]) == 0
    assert "| none |" in capsys.readouterr().out
    (tmp_path / "2" / "config.json").unlink()
    assert "one has no config.json" in one_line(["table", *runs], capsys)
    assert main(["table", runs[2]]) == 0
    assert "not tested" in capsys.readouterr().out
    unfinished = recorded(tmp_path / "u", complete=False, verdict="Not complete: 1 of 2.")
    assert main(["table", unfinished]) == 0
    assert "Not complete: 1 of 2." in capsys.readouterr().out


def test_summaries_with_anything_missing_or_changed_are_refused_or_shown(tmp_path, capsys):
    rng, results = random.Random(3), ROOT / "experiments" / "results"
    records = [json.loads((results / f"{name}.json").read_text())
               for name in ("small_batch", "lenet", "lesson", "vmap", "breast_cancer", "best_group", "bench_stacked")]
    for i in range(30):
        record = copy.deepcopy(rng.choice(records))
        record["rows"] = rng.sample(record["rows"], min(3, len(record["rows"])))
        for _ in range(rng.randint(1, 3)):
            at = rng.choice([record, *record["rows"]] if isinstance(record.get("rows"), list) else [record])
            name = rng.choice([*at]) if isinstance(at, dict) and at else None
            if name is None: continue
            if rng.random() < 0.5: del at[name]
            else: at[name] = rng.choice([None, "x", [], {}, -1, 1e400, [None], True])
        (tmp_path / f"{i}.json").write_text(json.dumps(record))
        try: status = main(["table", str(tmp_path / f"{i}.json")])
        except Exception as e: pytest.fail(f"{i}: {type(e).__name__}: {e}")
        out, err = capsys.readouterr()
        assert (status, bool(out), err.count("\n")) in ((0, True, 0), (2, False, 1)), i


def test_a_part_of_the_bench_that_lacks_its_compiler_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.undo()

    def rows(config): raise CompileError("no C++ compiler was found")
    monkeypatch.setattr("experiments.bench.compiled.rows", rows)
    err = one_line(["bench", "compiled", "--out", str(tmp_path / "run")], capsys)
    assert err == "error: the part compiled can't be timed: no C++ compiler was found; time other parts alone\n"


@pytest.mark.parametrize("name", EXPERIMENTS | TOOLS)
def test_help_is_text_throughout(name):
    """A single % in a help text is read as a format by argparse, and prints the option's insides."""
    assert "{'option_strings'" not in parser_of(name).format_help()
