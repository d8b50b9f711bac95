"""CPUBackendCallback: what it chooses, and that its measurement leaves no trace. No clock is trusted here."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import runner.backend
from norms import RunningBatchNorm
from runner import Callback, CPUBackendCallback, DataBunch, Dataset, Hooks, Learner, Runner, append_stats, get_dls


def settings(): return torch.backends.mkldnn.enabled, torch.get_num_threads()


@pytest.fixture(autouse=True)
def user():
    """The user's settings: oneDNN on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield True, 2
    assert settings() == (True, 2)
    torch.set_num_threads(before)


def learner(batches=2000, model=None, lr=0.05, **dls):
    rng = torch.Generator().manual_seed(0)
    ds = Dataset(torch.randn(40, 1, 6, 6, generator=rng), torch.randint(0, 3, (40,), generator=rng))
    train, valid = get_dls(ds, ds, 2, generator=torch.Generator().manual_seed(1), **dls)
    train = Claims(train, batches)
    torch.manual_seed(2)
    model = model or nn.Sequential(nn.Conv2d(1, 4, 3), RunningBatchNorm(4), nn.Dropout(0.3), nn.Flatten(),
                                   nn.Linear(64, 3))
    return Learner(model, torch.optim.SGD(model.parameters(), lr=lr), F.cross_entropy, DataBunch(train, valid, 3))


class Claims:
    """A loader that claims to have more batches than it has, so that few suffice for a measurement."""

    def __init__(self, dl, n): self.dl, self.n = dl, n

    def __len__(self): return self.n

    def __iter__(self): return iter(self.dl)


class Clock:
    """A clock that only `Conv` moves, by what the present setting is made to cost."""

    def __init__(self, cost): self.now, self.cost = 0.0, cost

    def perf_counter(self): return self.now


class Conv(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.w, self.clock = nn.Parameter(torch.zeros(36, 3)), [clock]

    def __deepcopy__(self, memo): return Conv(self.clock[0])

    def forward(self, x):
        self.clock[0].now += self.clock[0].cost[settings()]
        return x.flatten(1) @ self.w


class Sees(Callback):
    """The settings at every training batch, after the choice."""

    _order = 1000

    def begin_fit(self): self.seen = []

    def begin_batch(self): self.seen.append(settings())


@pytest.mark.parametrize(("cost", "chosen"), [
    ({(True, 2): 2.0, (True, 1): 1.9, (False, 2): 1.2, (False, 1): 1.0}, (False, 1)),
    ({(True, 2): 2.0, (True, 1): 2.5, (False, 2): 1.9, (False, 1): 3.0}, (True, 2)),     # 5 % are not worth a change
    ({(True, 2): 1.0, (True, 1): 9.0, (False, 2): 9.0, (False, 1): 9.0}, (True, 2)),
    ({(True, 2): 5.0, (True, 1): 1.0, (False, 2): 5.0, (False, 1): 5.0}, (True, 1)),
    ({(True, 2): 2.0, (True, 1): 1.8, (False, 2): 0.7, (False, 1): 0.83}, (False, 1)),   # nor 16 % a second thread
    ({(True, 2): 2.0, (True, 1): 1.8, (False, 2): 0.6, (False, 1): 0.83}, (False, 2)),
])
def test_the_fastest_setting_is_used_if_it_gains_a_tenth(monkeypatch, cost, chosen):
    clock = Clock(cost)
    monkeypatch.setattr(runner.backend, "time", clock)
    cb, sees = CPUBackendCallback(), Sees()
    Runner([cb, sees]).fit(1, learner(model=Conv(clock)))
    assert set(sees.seen) == {chosen}
    assert cb.choice == {"onednn": chosen[0], "threads": chosen[1]}
    assert cb.times == pytest.approx({s: 1e3 * c for s, c in cost.items()})
    assert cb.reason.startswith("measured: oneDNN on 2 threads ")


def test_much_larger_validation_batches_go_by_the_users_settings(monkeypatch):
    """What was measured on a batch of 2 says nothing of one of 16; in the next epoch's training the choice is back."""
    clock = Clock({(True, 2): 2.0, (True, 1): 2.0, (False, 2): 1.0, (False, 1): 1.0})
    monkeypatch.setattr(runner.backend, "time", clock)
    for valid_bs, in_validation in ((15, (False, 1)), (16, (True, 2))):
        cb, sees, learn = CPUBackendCallback(), Sees(), learner(model=Conv(clock))
        ds = learn.data.valid_ds
        learn.data.valid_dl = get_dls(ds, ds, 2, valid_bs=valid_bs)[1]
        Runner([cb, sees]).fit(2, learn)
        epoch = [(False, 1)] * 20 + [in_validation] * 3         # 40 images
        assert sees.seen == epoch * 2
    given, sees = CPUBackendCallback(onednn=False, threads=1), Sees()
    Runner([given, sees]).fit(1, learn)
    assert set(sees.seen) == {(False, 1)}


def test_a_setting_twice_as_slow_is_measured_once(monkeypatch):
    clock = Clock({(True, 2): 1.0, (True, 1): 1.5, (False, 2): 3.0, (False, 1): 3.0})
    calls, seconds = [], Conv.forward
    monkeypatch.setattr(runner.backend, "time", clock)
    monkeypatch.setattr(Conv, "forward", lambda self, x: (calls.append(settings()), seconds(self, x))[1])
    cb = CPUBackendCallback()
    Runner([cb]).fit(1, learner(batches=2000, model=Conv(clock)))   # 1 % of 2000 batches are 5 steps of 4 settings
    assert [calls.count(s) for s in ((True, 1), (False, 2), (False, 1))] == [6, 2, 2]


def test_the_measurement_leaves_no_trace():
    """A fit with the choice given from the start is the same bit for bit: weights, buffers, dropout, order."""
    cb, first = CPUBackendCallback(), learner()
    with Hooks(first.model[:1], append_stats) as hooks:
        Runner([cb]).fit(2, first)
        assert len(hooks[0].stats[0]) == 40                         # 20 training batches, twice, and no measurement
    assert cb.times
    state = torch.get_rng_state()
    second = learner()
    Runner([CPUBackendCallback(**cb.choice)]).fit(2, second)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("event", ["begin_fit", "begin_batch", "after_loss", "after_epoch"])
def test_the_users_settings_are_back_after_an_exception(event):
    def fail(self): raise ZeroDivisionError(event)
    bad = type("Bad", (Callback,), {event: fail, "_order": 2000})()
    with pytest.raises(ZeroDivisionError): Runner([CPUBackendCallback(False, 1), bad]).fit(1, learner())
    assert settings() == (True, 2)


def test_given_settings_hold_from_the_start_and_are_not_measured():
    cb, sees = CPUBackendCallback(onednn=False), Sees()
    Runner([cb, sees]).fit(1, learner())
    assert set(sees.seen) == {(False, 2)}
    assert (cb.times, cb.reason) == ({}, "as given")


def test_too_few_batches_leave_the_settings():
    cb, sees = CPUBackendCallback(), Sees()
    Runner([cb, sees]).fit(1, learner(batches=1199))
    assert (set(sees.seen), cb.times, cb.reason) == ({(True, 2)}, {}, "too few batches to be worth a measurement")


def test_a_model_that_cannot_be_copied_trains_all_the_same():
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo): raise RuntimeError("one of a kind")
    cb, learn = CPUBackendCallback(), learner(model=nn.Sequential(nn.Flatten(), Uncopyable(36, 3)))
    before = learn.model[1].weight.detach().clone()
    Runner([cb]).fit(1, learn)
    assert cb.reason == "a copy of the model failed (RuntimeError: one of a kind)"
    assert not torch.equal(before, learn.model[1].weight)


def test_a_thread_count_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="threads is 0; it must be a positive integer, or None to have it measured"):
        CPUBackendCallback(threads=0)




class Settings(Callback):
    """What is set while each batch is in the model, with its size."""

    _order = 200

    def __init__(self): self.seen = []

    def after_pred(self): self.seen.append((self.in_train, len(self.xb), *settings()))


def test_a_rule_answers_for_each_pass(user):
    learn = learner(batches=20, valid_bs=30)
    rule, watch = CPUBackendCallback(lambda images: images > 8, threads=1), Settings()
    Runner([rule, watch]).fit(2, learn)
    assert {seen for seen in watch.seen if seen[0]} == {(True, 2, False, 1)}
    assert {seen[1:] for seen in watch.seen if not seen[0]} == {(30, True, 1), (10, True, 1)}
    assert rule.choice == {"onednn": False, "threads": 1}
    assert (rule.reason, rule.times) == ("by rule", {})
    asked = []
    Runner([CPUBackendCallback(lambda images: asked.append(images) or True)]).fit(2, learner(batches=20))
    assert len(asked) == 3          # once for the training, and once for each validation
    assert asked[0] == 2


def test_a_rule_of_a_batch_that_can_not_be_counted(user):
    asked = []
    rule = CPUBackendCallback(lambda images: asked.append(images) or False)
    rule.run = type("Run", (), {"xb": object(), "in_train": True})()
    assert rule._by_rule(rule.onednn)[0] is False
    assert asked == [0]
