"""The command line takes any input: what is bad is one line and exit status 2, in every command, and no traceback."""

import argparse
import functools
import importlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import EXPERIMENTS, TOOLS, data, spoken
from experiments.__main__ import main, parser
from experiments.study.display import Display

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
    for _ in range(100):
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


def started(*argv, **kwargs):
    return subprocess.Popen([sys.executable, "-m", "experiments", *argv], stdout=subprocess.PIPE, cwd=ROOT,
                            stderr=subprocess.PIPE, text=True, **kwargs)


def test_letters_that_the_terminal_lacks_a_full_disk_and_no_output_are_no_traceback(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ran = [started("table", "Läufe", env=env), started("table", b"\xff", env=env),
           subprocess.Popen(f"{sys.executable} -m experiments > /dev/full", shell=True, cwd=ROOT, text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE),
           subprocess.Popen(f"{sys.executable} -m experiments >&- 2>&-", shell=True, cwd=ROOT),
           subprocess.Popen(f"{sys.executable} -m experiments small-batch --help | head -1", shell=True, cwd=ROOT,
                            text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)]
    said = [p.communicate(timeout=120) for p in ran]
    assert [p.returncode for p in ran] == [2, 2, 2, 0, 0]
    assert r"can't read 'L\xe4ufe'" in said[0][1]
    assert all((err or "").count("\n") <= 1 for _, err in said)
    if Path("/dev/full").exists(): assert said[2][1].startswith("error: the output can't be written: No space left")
    assert said[4][1] == ""


def test_ctrl_c_at_any_time_is_no_traceback(tmp_path):
    processes = []
    for i, delay in enumerate((0.3, 0.6)):      # while packages are imported
        p = started("inside", "--data", "digits", "--limit", "200", "--steps", "100000", "--out", f"{tmp_path}/{i}")
        time.sleep(delay)
        p.send_signal(signal.SIGINT)
        processes.append(p)
    for p in processes:
        _, err = p.communicate(timeout=120)
        assert p.returncode == 130
        assert "Traceback" not in err
