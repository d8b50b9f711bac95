"""Several optimizers, losses in turns, and optimizers that evaluate the loss themselves, against loops by hand."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import make_learn
from torch import nn, optim
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import StepLR

from runner import (
    SGD,
    Callback,
    ClosureStep,
    CudaCallback,
    DataBunch,
    Dataset,
    GradientAccumulation,
    GradientClip,
    Learner,
    LR_Find,
    MixedPrecision,
    Optimizers,
    ParameterStats,
    ParamScheduler,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    TorchScheduler,
    Turns,
    get_dls,
    sched_lin,
    sched_no,
)
from runner.optim import needs_closure


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- several as one -----------------------------------------------------------------------------------------------

def parts(model):
    return {"first": optim.Adam(model[0].parameters(), lr=0.01),
            "rest": optim.SGD([{"params": [model[2].weight]}, {"params": [model[2].bias], "lr": 0.3}], lr=0.1,
                              momentum=0.9)}


def several(n=8):
    learn = make_learn(n_train=n)
    learn.opt = Optimizers(**parts(learn.model))
    return learn


def by_hand(learn, epochs, each=lambda opts, step: None):
    opts, step = parts(learn.model), 0
    for _ in range(epochs):
        learn.model.train()
        for xb, yb in learn.data.train_dl:
            each(opts, step)
            learn.loss_func(learn.model(xb), yb).backward()
            for opt in opts.values(): opt.step()
            for opt in opts.values(): opt.zero_grad()
            step += 1
    return learn.model


@pytest.mark.parametrize("cbs", [[], [CudaCallback("cpu"), Recorder(), TerminateOnNonFinite()]])
def test_several_optimizers_step_together(cbs):
    learn = several()
    Runner(cbs).fit(3, learn)
    assert equal(learn.model, by_hand(make_learn(n_train=8), 3))


def test_schedules_reach_the_groups_of_all():
    def each(opts, step):
        for group, lr in zip([*opts["first"].param_groups, *opts["rest"].param_groups], (0.01, 0.1, 0.3), strict=True):
            group["lr"] = lr * (1 - step / 8)
    learn, run = several(), Runner([ParamScheduler("lr", sched_lin(1, 0), relative=True), Recorder()])
    run.fit(2, learn)
    assert equal(learn.model, by_hand(make_learn(n_train=8), 2, each))
    assert [lrs[4] for lrs in run.recorder.lrs] == [0.005, 0.05, 0.15]
    assert [g["lr"] for g in learn.opt.param_groups] == [0.01, 0.1, 0.3]
    scheds = [sched_no(v, v) for v in (1.0, 2.0, 3.0)]
    Runner([ParamScheduler("lr", scheds), run.recorder]).fit(1, learn)
    assert [lrs[-1] for lrs in run.recorder.lrs] == [1.0, 2.0, 3.0]


def test_a_scheduler_of_torch_takes_all_groups():
    learn, run = several(), Runner([TorchScheduler(lambda opt: StepLR(opt, 1, 0.5)), Recorder()])
    run.fit(2, learn)
    assert [lrs[4] for lrs in run.recorder.lrs] == [0.005, 0.05, 0.15]


def test_a_group_added_to_the_first_is_followed_and_the_others_keep_theirs():
    class Add(Callback):
        def begin_epoch(self):
            if self.run.epoch != 1: return
            self.run.opt["first"].add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 1.0})
    seen = []

    class See(Callback):
        def after_loss(self):
            if self.run.in_train: seen.append([g["lr"] for g in self.run.opt.param_groups])
    learn = several()
    Runner([ParamScheduler("lr", sched_lin(1, 0), relative=True), See()]).fit(2, learn, cbs=Add())
    assert seen[4] == [0.005, 0.5, 0.05, 0.15]
    assert [g["lr"] for g in learn.opt.param_groups] == [0.01, 1.0, 0.1, 0.3]


def test_state_dict_copies_and_pickles_go_on_alike():
    learn = several()
    Runner().fit(2, learn)
    other = several()
    other.model.load_state_dict(learn.model.state_dict())
    state = learn.opt.state_dict()
    assert [len(g["params"]) for g in state["param_groups"]] == [2, 1, 1]
    other.opt.load_state_dict(copy.deepcopy(state))
    twins = [other, copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))]
    for each in (learn, *twins):
        each.data.train_dl.sampler.sampler.generator.manual_seed(7)
        Runner().fit(2, each)
    for twin in twins:
        assert equal(twin.model, learn.model)
        assert repr(twin.opt) == "Optimizers(first=Adam, rest=SGD)"


def test_a_search_for_a_rate_leaves_no_trace_and_keeps_the_ratio():
    ends = []
    for find in (False, True):
        learn = several(16)
        Runner().fit(1, learn)
        if find:
            seen = Recorder()
            Runner().fit(2, learn, cbs=[LR_Find(10), seen])
            assert seen.lrs[0] == pytest.approx([lr / 30 for lr in seen.lrs[2]])
        Runner().fit(1, learn)
        ends.append(copy.deepcopy(learn.model))
    assert equal(*ends)


def test_what_does_not_go_together_is_refused():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'0' and '1' have a parameter in common, of shape \(2, 2\)"):
        Optimizers(SGD(a.parameters()), SGD([*b.parameters(), a.weight]))
    with pytest.raises(ValueError, match=r"'0' is a LBFGS, whose step needs a closure; .* by ClosureStep"):
        Optimizers(optim.LBFGS(a.parameters()))
    with pytest.raises(ValueError, match="got none; it needs at least one"): Optimizers()
    opt = Optimizers(gen=SGD(a.parameters()), disc=SGD(b.parameters()))
    with pytest.raises(ValueError, match=r"add the group to one of them: opt\['gen'\]\.add_param_group"):
        opt.add_param_group({"params": []})
    with pytest.raises(KeyError, match="there is no optimizer 'generator'; there are: gen, disc"): _ = opt["generator"]
    with pytest.raises(KeyError, match="'x'"), opt.only("x"): pass
    with opt.only("disc"): assert [g["params"][0] is b.weight for g in opt.param_groups] == [True]
    assert len(opt.param_groups) == 2


@pytest.mark.parametrize(("which", "names"), [
    (None, ["0.weight", "0.bias", "2.weight", "2.bias"]), ("*.weight", ["0.weight", "2.weight"])])
@pytest.mark.parametrize("order", [0, 200])
def test_parameters_that_are_unfrozen_in_mid_fit_have_statistics_from_then_on(which, names, order, capsys):
    class Unfreeze(Callback):
        def begin_epoch(self):
            if self.run.epoch != 1: return
            for p in self.run.model[2].parameters(): p.requires_grad_()
            self.run.opt.add_param_group({"params": [*self.run.model[2].parameters()], "lr": 0.5})
    learn, stats = make_learn(n_train=8), ParameterStats(which)
    for p in learn.model[2].parameters(): p.requires_grad_(False)
    learn.opt = optim.SGD(learn.model[0].parameters(), lr=0.1)
    unfreeze = Unfreeze()
    unfreeze._order = order
    Runner([unfreeze, stats]).fit(3, learn)
    begun = 4 if order < 110 else 8             # the epoch that began, or the next
    assert stats.paths == names
    for name in names: assert stats.series(name, "ratio")[0] == list(range(begun if name[0] == "2" else 0, 12))
    told = f"{len(names) // 2} parameter{'s' * (len(names) > 2)} more from epoch {begun // 4}"
    assert told in capsys.readouterr().out
    rows = stats.rows.where(parameter=names[-1])
    assert (rows[0]["epoch"], rows[0]["step"], len(rows)) == (begun // 4, begun, 12 - begun)
    moved = stats.series("2.weight", "weight", "update")
    assert all(u > 0 for u in moved[2])


# --- in turns -----------------------------------------------------------------------------------------------------

class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.gen = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.disc = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(8, 1))


def bce(out, target): return F.binary_cross_entropy_with_logits(out.float(), torch.full_like(out.float(), target))


def disc(run):
    run.fake = run.model.gen(torch.randn(len(run.xb), 3))
    return bce(run.model.disc(run.xb), 1.0) + bce(run.model.disc(run.fake.detach()), 0.0)


def gen(run): return bce(run.model.disc(run.fake), 1.0)


def gan(valid=False):
    torch.manual_seed(0)
    model, x = Gan(), torch.randn(24, 4) + 1
    dls = get_dls(Dataset(x, x), Dataset(x, x), 8, generator=torch.Generator().manual_seed(1))
    opt = Optimizers(disc=optim.Adam(model.disc.parameters(), 0.01), gen=optim.Adam(model.gen.parameters(), 0.02))
    return Learner(model, opt, None, DataBunch(dls[0], dls[1] if valid else None))


def gan_by_hand(epochs, clip=None, dtype=None):
    learn = gan()
    m, d, g = learn.model, learn.opt["disc"], learn.opt["gen"]
    losses = []
    torch.manual_seed(2)

    def cast(): return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    for _ in range(epochs):
        m.train()
        for xb, _ in learn.data.train_dl:
            with cast():
                fake = m.gen(torch.randn(len(xb), 3))
                loss = bce(m.disc(xb), 1.0) + bce(m.disc(fake.detach()), 0.0)
            loss.backward()
            if clip: clip_grad_norm_(m.disc.parameters(), clip)
            d.step()
            m.zero_grad()
            with cast(): g_loss = bce(m.disc(fake), 1.0)
            g_loss.backward()
            if clip: clip_grad_norm_(m.gen.parameters(), clip)
            g.step()
            m.zero_grad()
            losses.append((loss.item(), g_loss.item()))
    return m, losses


@pytest.mark.parametrize(("cbs", "kwargs"), [
    ([], {}), ([GradientClip(0.1)], {"clip": 0.1}), ([MixedPrecision(torch.bfloat16)], {"dtype": torch.bfloat16}),
    ([MixedPrecision(torch.bfloat16), GradientClip(0.1)], {"dtype": torch.bfloat16, "clip": 0.1})])
def test_a_gan_is_the_one_by_hand(cbs, kwargs):
    learn, seen = gan(), []

    class See(Callback):
        def after_batch(self): seen.append(tuple(loss.item() for loss in self.run.turns.losses.values()))
    run = Runner([Turns(disc=disc, gen=gen), Recorder(), See(), *cbs])
    torch.manual_seed(2)
    run.fit(3, learn)
    model, losses = gan_by_hand(3, **kwargs)
    assert equal(learn.model, model)
    assert seen == losses
    assert run.recorder.losses == [d for d, _ in losses]
    assert run.n_iter == 9
    assert len(run.recorder.lrs) == 2


def test_a_gan_validates_by_its_first_loss_and_searches_without_a_trace():
    run, learn = Runner([Turns(disc=disc, gen=gen), Recorder()]), gan(valid=True)
    run.fit(1, learn)
    before, losses = copy.deepcopy(learn.model), dict(run.turns.losses)
    run.fit(3, learn, cbs=LR_Find(6))
    assert equal(learn.model, before)
    assert run.turns.losses == losses
    assert set(run.evaluate(learn)) == {"loss"}


def test_turns_say_what_they_need():
    with pytest.raises(ValueError, match="Turns got no loss"): Turns()
    with pytest.raises(ValueError, match=r"losses for a, b, and the learner's optimizer is a SGD; it needs "
                                         r"Optimizers\(a=\.\.\., b=\.\.\.\)"):
        Runner([Turns(a=gen, b=disc)]).fit(1, make_learn())
    with pytest.raises(ValueError, match="is a Optimizers of disc, gen; it needs"):
        Runner([Turns(a=gen, b=disc)]).fit(1, gan())
    for cb, text in ((GradientAccumulation(2), "GradientAccumulation knows one: take larger batches"),
                     (MixedPrecision(torch.float16), "MixedPrecision with float16 knows one: use bfloat16")):
        with pytest.raises(ValueError, match=text): Runner([cb, Turns(disc=disc, gen=gen)]).fit(1, gan())


def test_after_an_exception_in_a_turn_the_next_fit_is_as_by_hand():
    n = []

    def fails(run):
        n.append(1)
        if len(n) == 2: raise KeyError("boom")
        return gen(run)
    learn, run = gan(), Runner([Turns(disc=disc, gen=fails)])
    with pytest.raises(KeyError): run.fit(1, learn)
    fresh = gan()
    learn.model.load_state_dict(fresh.model.state_dict())
    learn.opt.load_state_dict(fresh.opt.state_dict())
    learn.data = fresh.data
    torch.manual_seed(2)
    run.fit(3, learn)
    assert equal(learn.model, gan_by_hand(3)[0])


# --- closures -----------------------------------------------------------------------------------------------------

class Normed(nn.Sequential):
    def __init__(self): super().__init__(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3))


@pytest.mark.parametrize("model", [None, Normed])
@pytest.mark.parametrize("kwargs", [{"lr": 0.5}, {"max_iter": 4, "line_search_fn": "strong_wolfe"}])
def test_lbfgs_is_the_one_by_hand(model, kwargs):
    ends = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        learn = make_learn(n_train=8, bs=4, model=model and model())
        learn.opt = optim.LBFGS(learn.model.parameters(), **kwargs)
        learn.data.valid_dl = None          # it would draw a seed
        torch.manual_seed(3)
        if by_hand:
            losses = []
            for _ in range(3):
                learn.model.train()
                for xb, yb in learn.data.train_dl:
                    def closure(learn=learn, xb=xb, yb=yb):
                        learn.opt.zero_grad()
                        loss = learn.loss_func(learn.model(xb), yb)
                        loss.backward()
                        return loss
                    losses.append(learn.opt.step(closure).item())
                    learn.opt.zero_grad()
        else:
            run = Runner([ClosureStep(), Recorder()])
            run.fit(3, learn)
            losses = run.recorder.losses
        ends.append((losses, learn.model))
    assert ends[0][0] == ends[1][0]
    assert equal(ends[0][1], ends[1][1])


def test_an_optimizer_that_needs_a_closure_is_refused_with_the_reason():
    learn, run = make_learn(), Runner(Recorder())
    learn.opt = optim.LBFGS(learn.model.parameters())
    with pytest.raises(ValueError, match="LBFGS needs a closure in its step, since it evaluates the loss several times"
                                         r": add the callback ClosureStep\(\), or take another optimizer"):
        run.fit(1, learn)
    assert run.evaluate(learn)["loss"] > 0          # which takes no step
    run.fit(1, make_learn())                        # and it can be used again

    class Own(Callback):
        def step(self): self.run.opt.step(lambda: self.run.loss)
    Runner(Own()).fit(1, learn)


def test_whether_an_optimizer_needs_a_closure_is_seen_through_the_wrapper_of_a_schedule():
    for kind, needs in ((optim.SGD, False), (optim.LBFGS, True)):
        opt = kind([nn.Parameter(torch.ones(2))])
        assert needs_closure(opt) is needs
        StepLR(opt, 1)
        assert needs_closure(opt) is needs


def test_closures_beside_what_knows_one_loss():
    learn = make_learn()
    learn.opt = optim.LBFGS(learn.model.parameters())
    with pytest.raises(ValueError, match="ClosureStep evaluates a loss several times in a batch, and GradientAccumul"):
        Runner([ClosureStep(), GradientAccumulation(2)]).fit(1, learn)


def test_a_search_with_lbfgs_leaves_no_trace():
    ends = []
    for find in (False, True):
        learn = make_learn(n_train=8)
        learn.opt = optim.LBFGS(learn.model.parameters(), lr=0.1)
        run = Runner([ClosureStep()])
        run.fit(1, learn)
        if find: run.fit(1, learn, cbs=LR_Find(4, max_lr=0.5))
        run.fit(1, learn)
        ends.append(learn.model)
    assert equal(*ends)
