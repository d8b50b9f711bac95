"""Types: the packages pass mypy --strict, a user's script does, and mistakes in it are found by mypy and pyright."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = '''
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from norms import BatchNorm, LayerNorm, RunningBatchNorm, convert_norms
from runner import (
    AvgStatsCallback,
    Callback,
    DataBunch,
    EarlyStopping,
    GradientClip,
    Learner,
    LR_Find,
    MixedPrecision,
    ParamScheduler,
    Recorder,
    Runner,
    accuracy,
    combine_scheds,
    get_dls,
    sched_cos,
    sched_lin,
)


class StopAt(Callback):
    def __init__(self, steps: int) -> None: self.steps = steps

    def after_batch(self) -> None:
        if self.run.n_iter >= self.steps: print(self.run.epoch)


class Twice(Callback):
    def predict(self) -> None: self.run.pred = self.run.model(self.run.xb)


ds = TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
model = nn.Sequential(nn.Linear(4, 8), RunningBatchNorm(8, mom=0.1), nn.ReLU(), nn.Linear(8, 3))
train_dl, valid_dl = get_dls(ds, ds, bs=8)
learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, DataBunch(train_dl, valid_dl))
run = Runner([Recorder(), AvgStatsCallback(accuracy), GradientClip(max_norm=1.0), MixedPrecision(torch.bfloat16)])
schedule = combine_scheds([0.3, 0.7], [sched_lin(0.1, 0.4), sched_cos(0.4, 0.01)])
run.fit(2, learn, cbs=[ParamScheduler("lr", schedule), StopAt(5), EarlyStopping("valid_loss", patience=3)])
recorder: Recorder = run[Recorder]
losses: list[float] = recorder.losses
last: float = run[AvgStatsCallback].history[-1]["valid_loss"]
finder = LR_Find(max_iter=20)
layers: list[nn.Module] = [BatchNorm(8), LayerNorm((8,), eps=1e-5)]
mean, var, images = RunningBatchNorm(8).running_moments(2)
converted = convert_norms(model, RunningBatchNorm)
'''

MISTAKES = {
    "a misspelt attribute": ("run[Recorder]\nlosses", "run[Recorder]\nrecorder.loses\nlosses"),
    "a wrong argument": ("RunningBatchNorm(8, mom=0.1)", 'RunningBatchNorm(8, mom="0.1")'),
    "an argument that there is not": ("LayerNorm((8,), eps=1e-5)", "LayerNorm((8,), epsilon=1e-5)"),
    "a callback of another class": ("recorder: Recorder = run[Recorder]", "recorder: Recorder = run[AvgStatsCallback]"),
    "a wrong type of a result": ("losses: list[float] = recorder.losses", "losses: list[str] = recorder.losses"),
    "a missing argument": ("run.fit(2, learn, cbs", "run.fit(2, cbs"),
}


# Parts of torch, and what they import, that none of what is checked takes a type from: half the time of a check.
UNREAD = """
[[tool.mypy.overrides]]
module = ["IPython.*", "hypothesis.*", "onnx.*", "onnx_ir.*", "onnxscript.*", "prompt_toolkit.*", "sympy.*",
          "torch._dynamo.*", "torch._export.*", "torch._functorch.*", "torch._higher_order_ops.*", "torch._inductor.*",
          "torch._native.*", "torch.ao.*", "torch.distributions.*", "torch.export.*", "torch.fx.experimental.*",
          "torch.fx.passes.*", "torch.onnx.*", "torch.package.*", "torch.quantization.*", "torch.testing._internal.*"]
follow_imports = "skip"
"""


def checked(tool, tmp_path, *more):
    """The errors that `tool` finds: in the user's script, in each of those with a mistake, elsewhere."""
    pytest.importorskip(tool)
    (tmp_path / "user.py").write_text(SCRIPT)
    for i, (name, (right, wrong)) in enumerate(MISTAKES.items()):
        assert right in SCRIPT, name
        (tmp_path / f"mistake_{i}.py").write_text(SCRIPT.replace(right, wrong, 1))
    run = subprocess.run([sys.executable, "-m", tool, *more, *map(str, sorted(tmp_path.glob("*.py")))], cwd=ROOT,
                         capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if tool == "pyright" and "mistake_0.py" not in run.stdout: pytest.skip(f"pyright can't run: {run.stderr[-300:]}")
    errors = [line for line in run.stdout.splitlines() if "error:" in line]
    found = [[line for line in errors if f"mistake_{i}.py" in line] for i in range(len(MISTAKES))]
    return [e for e in errors if "user.py" in e], found, [e for e in errors if str(tmp_path) not in e]


def check_mistakes(found):
    for name, lines in zip(MISTAKES, found, strict=True): assert lines, name


def test_mypy_strict_passes_the_packages_and_a_user_s_script_and_finds_each_mistake_in_it(tmp_path):
    config = tmp_path / "mypy.toml"
    config.write_text((ROOT / "pyproject.toml").read_text() + UNREAD)
    user, found, elsewhere = checked("mypy", tmp_path, "--config-file", str(config), "--no-incremental", "norms",
                                     "runner", "experiments")
    assert not elsewhere
    assert not user
    check_mistakes(found)


def test_pyright_passes_a_user_s_script_and_finds_each_mistake_in_it(tmp_path):
    user, found, _ = checked("pyright", tmp_path, "--pythonpath", sys.executable)
    assert not user
    check_mistakes(found)
