"""What `accuracy` takes and refuses, and metrics with state."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, precision_score, roc_auc_score
from test_runner_loop import make_learn

from runner import AvgStats, AvgStatsCallback, Callback, DataBunch, Dataset, Learner, Runner, accuracy, get_dls

N, C, L = 4, 3, 5


@pytest.mark.parametrize("shape", [(N,), (N, L), (N, 2, L)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_accuracy_of_labels_of_the_right_shape(shape, dtype):
    torch.manual_seed(0)
    yb = torch.randint(0, C, shape)
    out = F.one_hot(yb, C).movedim(-1, 1) + 0.1 * torch.rand(shape[0], C, *shape[1:])
    assert accuracy(out, yb.to(dtype)).item() == 1
    wrong = yb.clone()
    wrong.flatten()[0] = (wrong.flatten()[0] + 1) % C
    assert accuracy(out, wrong.to(dtype)).item() == pytest.approx(1 - 1 / yb.numel())


def test_accuracy_of_two_classes_takes_bools():
    assert accuracy(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([True, True])).item() == 0.5


@pytest.mark.parametrize(("out", "yb", "dtype", "mend"), [
    ((N, C), (N, 1), torch.int64, "use yb.squeeze(1)"),
    ((N, C), (1, N), torch.int64, "use yb.flatten()"),
    ((N, C), (N, 1), torch.float32, "use yb.squeeze(1).long()"),
    ((N, C), (N,), torch.float32, "use yb.long()"),
    ((N, C), (N,), torch.bfloat16, "use yb.long()"),
    ((N, C), (N, C), torch.float32, "use yb.argmax(1), if these are probabilities or one-hot"),
    ((N, C), (N, C), torch.int64, "use yb.argmax(1)"),
    ((N, C), (C,), torch.int64, "give the loader, or a metric of your own, labels of that shape"),
    ((N, C), (), torch.int64, "labels of that shape"),
    ((N, C, L), (N,), torch.int64, "labels of that shape"),
    ((N, C, L), (N, 1, L), torch.int64, "use yb.squeeze(1)"),
    ((N, C, L), (N, C, L), torch.float32, "use yb.argmax(1)")])
def test_accuracy_refuses_other_labels(out, yb, dtype, mend):
    out, yb = torch.randn(out), torch.ones(yb).to(dtype)
    with pytest.raises(ValueError, match="accuracy got labels of shape") as e: accuracy(out, yb)
    for said in (mend, str(tuple(yb.shape)), str(yb.dtype), f"of shape {(N, L) if out.ndim == 3 else (N,)}"):
        assert said in str(e.value)
    if "use yb." in str(e.value):
        mended = eval(str(e.value).partition(": use ")[2].partition(",")[0], {"yb": yb})
        assert 0 <= accuracy(out, mended).item() <= 1


@pytest.mark.parametrize("shape", [(N,), (N, 1), ()])
def test_accuracy_refuses_a_single_score(shape):
    with pytest.raises(ValueError, match=r"it needs one score for each of at least two classes along axis 1, \(N, C\)"):
        accuracy(torch.randn(shape), torch.zeros(N).long())


def test_accuracy_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="accuracy got labels of type list; it needs tensors"):
        accuracy(torch.randn(N, C), [0] * N)
    with pytest.raises(TypeError, match="accuracy got predictions of type dict"):
        accuracy({"logits": torch.randn(N, C)}, torch.zeros(N).long())


def test_accuracy_looks_at_no_value():
    out, yb = torch.empty(N, C, device="meta"), torch.empty(N, dtype=torch.int64, device="meta")
    assert accuracy(out, yb).shape == ()
    with pytest.raises(ValueError, match=r"use yb.squeeze\(1\)"): accuracy(out, yb[:, None])


# --- metrics with state -------------------------------------------------------------------------------------------

class MacroF1:
    """As a torchmetrics metric: counts in `update`, one number in `compute`."""

    def __init__(self, classes): self.classes, self.log = classes, []

    def reset(self):
        self.table = torch.zeros(self.classes, self.classes)
        self.log.append("reset")

    def update(self, pred, yb):
        assert not pred.requires_grad
        self.table.index_put_((yb, pred.argmax(1)), torch.ones(len(yb)), accumulate=True)
        self.log.append("update")

    def compute(self):
        self.log.append("compute")
        right = self.table.diag()
        return (2 * right / (self.table.sum(0) + self.table.sum(1))).nan_to_num(0).mean()


class AUROC:
    """Of class 1, by ranks; keeps all predictions, and computes a plain float."""

    name = "auc"

    def reset(self): self.scores, self.labels = [], []

    def update(self, pred, yb):
        self.scores.append(pred[:, 1])
        self.labels.append(yb == 1)

    def compute(self):
        s, y = torch.cat(self.scores), torch.cat(self.labels)
        pairs = s[y][:, None] - s[~y]
        return ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()


class PerClass(MacroF1):
    def compute(self):
        self.log.append("compute")
        right = (self.table.diag() / self.table.sum(0)).nan_to_num(0)
        return {f"precision_{c}": right[c] for c in range(self.classes)}


class Keep(Callback):
    """The predictions and targets of each pass."""

    def __init__(self): self.passes = []

    def begin_epoch(self): self.passes.append(([], []))

    def begin_validate(self): self.passes.append(([], []))

    def after_loss(self):
        preds, targets = self.passes[-1]
        preds.append(self.pred.detach())
        targets.append(self.yb)


def learner(n_train=23, n_valid=17, bs=4):
    torch.manual_seed(1)
    x = torch.randn(n_train + n_valid, 6)
    y = (x[:, :3] + 0.5 * torch.randn(n_train + n_valid, 3)).argmax(1)
    model = torch.nn.Linear(6, 3)
    dls = get_dls(Dataset(x[:n_train], y[:n_train]), Dataset(x[n_train:], y[n_train:]), bs)
    return Learner(model, torch.optim.SGD(model.parameters(), 0.5), F.cross_entropy, DataBunch(*dls))


def test_metrics_with_state_equal_scikit_learns():
    f1, keep = MacroF1(3), Keep()
    run = Runner([AvgStatsCallback([f1, AUROC(), accuracy, PerClass(3)], quiet=True), keep])
    run.fit(2, learner())
    history = run.avg_stats.history
    assert list(history[0])[1:8] == ["train_loss", "train_macro_f1", "train_auc", "train_accuracy",
                                     "train_precision_0", "train_precision_1", "train_precision_2"]
    for i, (preds, targets) in enumerate(keep.passes):
        out, y, phase, row = torch.cat(preds), torch.cat(targets), ("train", "valid")[i % 2], history[i // 2]
        hat = out.argmax(1)
        assert row[f"{phase}_macro_f1"] == pytest.approx(f1_score(y, hat, average="macro", zero_division=0), abs=1e-6)
        assert row[f"{phase}_auc"] == pytest.approx(roc_auc_score(y == 1, out[:, 1]), abs=1e-12)
        assert row[f"{phase}_accuracy"] == pytest.approx((hat == y).double().mean().item(), abs=1e-6)
        for c, p in enumerate(precision_score(y, hat, average=None, labels=range(3), zero_division=0)):
            assert row[f"{phase}_precision_{c}"] == pytest.approx(p, abs=1e-6)
        assert all(type(v) in (int, float) for v in row.values())
    assert f1.log == []                                         # the object itself is only copied


def test_a_metric_is_reset_at_the_start_of_a_pass_and_computed_once_at_its_end(capsys):
    run = Runner(AvgStatsCallback(MacroF1(3)))                  # prints
    run.fit(2, learner(n_train=8, n_valid=8))
    train, valid = run.avg_stats.train_stats.metrics[0], run.avg_stats.valid_stats.metrics[0]
    assert train is not valid
    assert train.log == ["reset"] + ["reset", "update", "update", "compute"] * 2
    assert valid.log == ["reset"] + ["reset", "update", "compute"] * 2
    assert capsys.readouterr().out.count("valid: [") == 2


def test_a_skipped_pass_leaves_nan_in_each_column_and_computes_nothing():
    class NoValidation(Callback):
        def begin_validate(self): return self.epoch == 0
    run = Runner([AvgStatsCallback([PerClass(2), accuracy], quiet=True), NoValidation()])
    learn = learner()
    learn.data.train_dl.dataset.y.clamp_(max=1)
    learn.data.valid_dl.dataset.y.clamp_(max=1)
    learn.model = torch.nn.Linear(6, 2)
    learn.opt = torch.optim.SGD(learn.model.parameters(), 0.1)
    run.fit(2, learn)
    first, second = run.avg_stats.history
    assert list(first) == list(second)
    assert [k for k, v in first.items() if math.isnan(v)] == [
        "valid_loss", "valid_precision_0", "valid_precision_1", "valid_accuracy"]
    assert run.avg_stats.valid_stats.metrics[0].log.count("compute") == 1


def test_metrics_of_one_name_and_a_collection_that_can_be_iterated():
    class Collection(PerClass):
        def __iter__(self): return iter(["a", "b"])             # as a MetricCollection
    assert AvgStats([MacroF1(3), MacroF1(3), AUROC(), accuracy, accuracy], True).names == [
        "loss", "macro_f1", "macro_f1_2", "auc", "accuracy", "accuracy_2"]
    run = Runner(AvgStatsCallback(Collection(3), quiet=True))
    run.fit(1, learner())
    assert "valid_precision_2" in run.avg_stats.history[0]
    run = Runner(AvgStatsCallback([PerClass(3), PerClass(3)], quiet=True))
    run.fit(1, learner())
    assert run.avg_stats.history[0]["train_precision_1"] == run.avg_stats.history[0]["train_precision_1_2"]


def test_a_metric_moves_to_the_loss_s_device():
    class Moves(MacroF1):
        def to(self, device):
            self.log.append(str(device))
            return self
    run = Runner(AvgStatsCallback(Moves(3), quiet=True))
    run.fit(1, learner(n_train=8))
    assert run.avg_stats.train_stats.metrics[0].log == ["reset", "reset", "cpu", "update", "update", "compute"]


@pytest.mark.parametrize(("value", "text"), [
    (torch.ones(3), r"computed a tensor of shape \(3,\); compute\(\) must return one number, or a dict of numbers"),
    ("no", r"computed 'no' \(str\); compute\(\) must return one number"),
    ({"a": [1.0]}, r"computed \[1.0\] \(list\); compute\(\) must return"),
    (None, r"computed None \(NoneType\)")])
def test_a_metric_that_computes_something_else(value, text):
    class Odd(MacroF1):
        def compute(self): return value
    with pytest.raises(ValueError, match="the metric 'odd' " + text):
        Runner(AvgStatsCallback(Odd(3))).fit(1, make_learn())


def test_a_class_in_the_place_of_a_metric():
    for metrics in (MacroF1, [accuracy, MacroF1]):
        with pytest.raises(TypeError, match=r"the metric MacroF1 is a class; give an object of it: MacroF1\(\)"):
            AvgStatsCallback(metrics)


def test_metrics_with_state_can_be_pickled():
    run = Runner(AvgStatsCallback([MacroF1(3), accuracy], quiet=True))
    learn = learner()
    run.fit(1, learn)
    twin = pickle.loads(pickle.dumps(run))
    assert twin.avg_stats.history == run.avg_stats.history
    twin.fit(1, learn)
    assert len(twin.avg_stats.history) == 2


def test_a_graph_is_not_kept_by_a_metric_that_keeps_predictions():
    class Out(AUROC):
        def update(self, pred, yb):
            super().update(pred["out"][0], yb)
            assert not pred["out"][0].requires_grad

        def compute(self): return len(self.scores)
    learn = learner()
    inner, learn.model = learn.model, torch.nn.Sequential(learn.model)
    learn.model.forward = lambda x: {"out": (inner(x), "word")}
    learn.loss_func = lambda pred, yb: F.cross_entropy(pred["out"][0], yb)
    run = Runner(AvgStatsCallback(Out(), quiet=True))
    run.fit(1, learn)
    assert run.avg_stats.history[0]["train_auc"] == 6.0
