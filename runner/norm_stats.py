"""What norm layers do, seen from outside: `preflight` before training, `NormStats` in it, `train_eval_gap` after it.

A norm layer is known by its class, if that is one of torch's, or by a protocol of two methods. The norms of `norms`
have them and a norm of your own can, without an import from anywhere:

    statistic_groups(x)     `x` as `(statistics, values)`: a row for each mean and variance that a batch has of its own,
                            with the values behind it; where images have their own, image after image
    running_moments(b)      only where training too normalises by running statistics: their mean and variance as used
                            now (clamped, say, where the buffer `running_var` is not), `(C,)` each, and how many images
                            they remember at batches of `b`, or None

Running statistics used in evaluation are looked for as `running_mean` and `running_var`, `(C,)` each. A layer of
another kind with "Norm" in its class's name is reported as unknown.
"""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import BatchSampler

from runner.rows import Rows, text_table
from runner.states import loader_states, module_states, random_states
from runner.stats import Probe, choose, first_tensor

TORCH_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
LEVELS = ("ok", "warn", "fail")
PROTOCOL = "a method statistic_groups(x) that returns x as (statistics, values)"

# A variance taken over n normal values has the relative standard error sqrt(2 / (n - 1)); above a quarter, which is
# below 33 values, the scale of a channel is mostly chance. (Values of one image are alike, so that the count flatters
# large maps: take it for the most that a statistic can rest on.)
NOISY = 0.25
# Statistics of an image's own are the same in training and evaluation and not noise; but of n values mean and scale are
# taken away for good. Above a quarter of them, which is below 8 values, there is a warning.
LOST = 0.25


def known(m):
    """Whether `m` is a norm layer that can be looked at."""
    return isinstance(m, TORCH_NORMS) or hasattr(m, "statistic_groups")


def norm_layers(model):
    """The norm layers of `model`, `{module: path}`, and in the same form those that are unknown.

    What lies within a norm layer is its own affair. Not unknown are modules that hold a norm layer, and torch's own.
    """
    norms, strange, within = {}, {}, set()
    for path, m in model.named_modules():
        if m in within: continue
        if known(m):
            norms[m] = path
            within.update(m.modules())
        elif ("Norm" in type(m).__name__ and not type(m).__module__.startswith("torch.")
              and not any(known(inner) for inner in m.modules())): strange[m] = path
    return norms, strange


def statistic_groups(m, x):
    """`x`, the input of the norm layer `m`, as `(statistics, values)`: the protocol for torch's norms too.

    Of `nn.SyncBatchNorm` they are the values of this process. Shapes: `x` `(N, C, *spatial)`, for `nn.LayerNorm` and
    `nn.RMSNorm` `(*, *normalized_shape)`.
    """
    if hasattr(m, "statistic_groups"): return m.statistic_groups(x)
    if isinstance(m, _BatchNorm): return x.transpose(0, 1).flatten(1)
    if isinstance(m, nn.GroupNorm): return x.reshape(len(x) * m.num_groups, -1)
    if isinstance(m, _InstanceNorm):
        return x.flatten(1) if x.ndim == m._get_no_batch_dim() else x.flatten(0, 1).flatten(1)
    return x.reshape(-1, math.prod(m.normalized_shape))


def shared(m, x):
    """Whether the images of a batch share the statistics of the norm layer `m`: they do if two have as many as one."""
    if not hasattr(m, "statistic_groups"): return isinstance(m, _BatchNorm)
    one = x[:1]
    return len(m.statistic_groups(torch.cat((one, one)))) == len(m.statistic_groups(one))


def running_statistics(m):
    """Copies of the running mean and variance that the layer `m` evaluates by, `(C,)` each, or None if it has none."""
    mean, var = (getattr(m, name, None) for name in ("running_mean", "running_var"))
    return None if mean is None or var is None else (mean.clone(), var.clone())


def _eps(m, x):
    """What the norm layer `m` adds to the variance of `x`."""
    eps = getattr(m, "eps", 0.0)
    return torch.finfo(x.dtype).eps if eps is None else eps         # None: nn.RMSNorm's own way


@contextmanager
def _undone(model, *loaders):
    """What happens to `model`, the loaders and the random states is undone at the end, and whenever the function that
    this yields is called (see `module_states`). Nothing is recorded for gradients, and what is compiled runs eagerly:
    it would pass hooks by.
    """
    if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{type(model).__name__} has layers that don't know their channels yet; run one batch through "
                         "the model first")
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
                   for m in model.modules())
    parts = module_states(model), loader_states(*loaders), random_states()

    def restore():
        for part in parts: part()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext(): yield restore
    finally: restore()


@contextmanager
def _hooked(modules, before=None, after=None):
    """`before(module, input)` and `after(module, input, output)` at every run of `modules`, until the block is left."""
    handles = []

    def given(args, kwargs): return next(iter((*args, *kwargs.values())), None)
    try:
        for m in modules:
            if before: handles.append(m.register_forward_pre_hook(
                lambda m, args, kwargs: before(m, given(args, kwargs)), with_kwargs=True))
            if after: handles.append(m.register_forward_hook(
                lambda m, args, kwargs, y: after(m, given(args, kwargs), y), with_kwargs=True))
        yield
    finally:
        for handle in handles: handle.remove()


def _ready(model, xb, tfm, caller):
    """The batch as the model gets it: on the model's device, then transformed."""
    if not isinstance(xb, torch.Tensor):
        raise TypeError(f"{caller} got a batch of {type(xb).__name__}; it needs a tensor xb of images: wrap what gives "
                        "it, as in (b['image'] for b in loader)")
    xb = xb.to(next(iter((*model.parameters(), *model.buffers())), xb).device)
    return xb if tfm is None else tfm(xb)


def _wide(t):
    """`t` without a graph in float64, in which no square overflows (float32 on MPS, which lacks it)."""
    return t.detach().to(torch.float32 if t.device.type == "mps" else torch.float64)


# --- before training ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Finding:
    """What `preflight` found on one run of one norm layer.

    `path` and `module` (the class's name) say where, `level` ("ok", "warn" or "fail") and `text` what follows. `batch`
    (images) and `map` (sizes of the spatial axes) are what came in, `statistics` is how many the batch has and `values`
    on how many each rests: None where the layer is unknown or didn't run. `last` is true of the smaller last batch.
    """

    path: str
    module: str
    level: str
    text: str
    batch: int | None = None
    map: tuple = ()
    statistics: int | None = None
    values: int | None = None
    last: bool = False

    def __str__(self):
        where = f"{self.path} {self.module}".lstrip()
        if self.batch is not None: where += f", {'last batch of' if self.last else 'batch'} {self.batch}"
        if len(self.map) == 1: where += f", length {self.map[0]}"
        elif self.map: where += f", {'x'.join(map(str, self.map))} map"
        return f"{self.level:<6}{where}: {self.text}"


@dataclass(frozen=True)
class Preflight:
    """The report of `preflight`: a list of `Finding`s in the order of the forward; `str` has a line for each."""

    findings: list = field(default_factory=list)

    @property
    def ok(self): return all(f.level != "fail" for f in self.findings)

    def __str__(self):
        counts = ", ".join(f"{sum(f.level == level for f in self.findings)} {level}" for level in LEVELS)
        return "\n".join(map(str, (*self.findings, counts if self.findings else "no norm layer")))


def preflight(model, xb, *, tfm=None):
    """Say of every norm layer, before training, how many values its statistics rest on and what follows.

    One batch goes through the model in training mode, without gradients; everything that this changes is put back
    (parameters, buffers, attributes, modes, random states; also after an exception). Hooks of yours see the batch.

    If `xb` is a loader whose sampler and data set tell the size of a smaller last batch, as many images go through
    as well, and a layer is reported again where they fare worse.

    What is looked for:

    - statistics over one value (the output is constant, or torch refuses) or two (outputs are +-1), or so few that a
      variance is mostly chance: its relative standard error over n normal values is sqrt(2 / (n - 1)), 141 % for 2,
      25 % for 33. Where statistics are averaged over batches, n counts the images that they remember;
    - an `eps` above the variance; a clamp that holds it;
    - running statistics that are missing, do not move, or are not what training normalises by;
    - a bias of a convolution or linear layer that the norm's mean takes off again;
    - norms that are unknown or didn't run.

    Args:
        model: the model, as it is about to be trained.
        xb: a batch, or a loader of such or of pairs `(xb, yb)`, of which the first is taken. (Where it is a
            generator, that one is gone.)
        tfm: transform of the batch, such as `view_tfm(1, 28, 28)`.

    Returns:
        A `Preflight`: `findings`, `ok` (no failure); print it.

    Raises:
        TypeError: batches that aren't tensors.
        ValueError: an empty loader, layers that are not initialised.
    """
    model = getattr(model, "_orig_mod", model)                      # torch.compile's wrapper has it under this name
    norms, strange = norm_layers(model)
    frozen = {m for m in norms if model.training and not m.training}
    with _undone(model, xb) as restore:
        first, rest = _first_batch(xb)
        x = _ready(model, first, tfm, "preflight")
        model.train()
        findings = _survey(model, norms, strange, frozen, x)
        if 0 < rest < len(x):
            restore()
            model.train()
            full = {f.path: f for f in reversed(findings)}
            findings += [replace(f, last=True) for f in _survey(model, norms, strange, frozen, x[:rest])
                         if f.batch is not None and _worse(f, full[f.path])]
    return Preflight(findings)


def _worse(f, than):
    """Whether the finding `f` is worse than the other one; one failure is worse than another if it has fewer values."""
    return (LEVELS.index(f.level), -(f.values or 0)) > (LEVELS.index(than.level), -(than.values or 0)) and (
        f.level == "fail" or f.level != than.level)


def _first_batch(data):
    """The first batch of `data`, and the size of a smaller last one as far as that can be known (else 0)."""
    if isinstance(data, torch.Tensor): return data, 0
    try: xb = next(iter(data))
    except StopIteration: raise ValueError("preflight got a loader without a batch; give it at least one") from None
    if isinstance(xb, (tuple, list)): xb = xb[0]
    # The loaders of `get_dls` have the batch sampler as their sampler.
    samplers = getattr(data, "batch_sampler", None), getattr(data, "sampler", None)
    sampler = next((s for s in samplers if isinstance(s, BatchSampler)), None)
    if sampler is None or sampler.drop_last or not hasattr(sampler.sampler, "__len__"): return xb, 0
    return xb, len(sampler.sampler) % sampler.batch_size


def _survey(model, norms, strange, frozen, x):
    """Run `x` through `model` and judge every norm layer on the way: a list of `Finding`s."""
    found, inside, bias, images = [], [], (None, None), len(x)
    paths = {m: path for path, m in model.named_modules()}

    def enter(m, x): inside.append((m, x, running_statistics(m)))

    def leave(m, x, y):
        *_, before = inside.pop()
        f = Finding(paths[m], type(m).__name__, "warn", f"unknown norm: give its class {PROTOCOL}", images,
                    tuple(getattr(x, "shape", ()))[2:])
        if m in norms:
            level, text = _judge(m, x, before, m in frozen, paths.get(bias[0]) if bias[1] is x else None)
            f = replace(f, level=level, text=text, **_shape(m, x))
        if f not in found: found.append(f)

    def keep(m, x, y):
        nonlocal bias
        if m.bias is not None and (isinstance(m, _ConvNd) or x.ndim == 2): bias = m, y
    linear = [m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    stopped = "didn't run in this forward pass"
    with _hooked((*norms, *strange), enter, leave), _hooked(linear, after=keep):
        try: model(x)
        except ValueError as e:
            m, x, _ = inside[-1] if inside else (None, None, None)
            if m not in norms or _shape(m, x)["values"] > 1: raise
            text = f"1 value per statistic: it refuses to train ({e})"
            found.append(Finding(paths[m], type(m).__name__, "fail", text, images, **_shape(m, x)))
            stopped = f"not reached, because {paths[m]} refuses"
    ran = {f.path for f in found}
    return found + [Finding(path, type(m).__name__, "warn", stopped) for m, path in {**norms, **strange}.items()
                    if path not in ran]


def _shape(m, x):
    """The entries of a `Finding` on the input of a norm layer."""
    # What torch's LayerNorm and RMSNorm get is not channels and a map.
    positions = () if isinstance(m, (nn.LayerNorm, nn.RMSNorm)) else tuple(x.shape[2:])
    return dict(zip(("map", "statistics", "values"), (positions, *statistic_groups(m, x).shape), strict=True))


def _error(n):
    """In words, by how much a variance over `n` values is off; empty if that is little."""
    error = math.sqrt(2 / (n - 1)) if n > 1 else math.inf
    return f"the variance has a standard error of {100 * error:.0f} %" if error > NOISY else ""


def _judge(m, x, before, was_frozen, biased):
    """Level and text for the norm layer `m`, which has just run on `x` with running statistics `before` it.

    `was_frozen`: whether it was in evaluation mode in a model in training mode; `biased`: the path of the layer that
    added a bias to `x` last.
    """
    if not m.training and before: return "ok", "in evaluation mode in training too: its running statistics stay"
    groups, eps = _wide(statistic_groups(m, x)), _eps(m, x)
    n, common, rms = groups.shape[1], shared(m, x), isinstance(m, nn.RMSNorm)
    running = m.running_moments(len(x)) if hasattr(m, "running_moments") else None
    var = running[1] if running else groups.square().mean(1) if rms else groups.var(1, unbiased=False)
    live = var[var > 0]                                             # a ReLU leaves channels without any value
    median = live.median().item() if len(live) else 0.0
    if running: remarks = [_past_batches(n, len(x), running[2])]
    else: remarks = [_one_batch(n, common, rms, eps < median)]

    def remark(level, text): remarks.append((level, text))
    if running and before and (held := int((var > m.running_var).sum())):
        remark("ok", f"a clamp holds the variance of {held} of {len(var)} channels")
    if n > 1 and eps > median:
        remark("warn", f"eps {eps:g} is above the variance (median {median:.2g}): the input is hardly scaled")
    after = running_statistics(m)
    if after and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        remark("warn", "the running statistics don't move in training (momentum 0?), and evaluation uses them")
    elif after and not common:
        remark("warn", "evaluation normalises by running statistics and training by each image's own")
    if common and not (after or running):
        remark("warn", "no running statistics: in evaluation an output depends on the rest of its batch")
    if was_frozen: remark("warn", "it was in evaluation mode, and model.train() at every epoch ends that")
    # A statistic of one channel: its mean takes in the whole of the channel's bias.
    if biased is not None and not (running or rms) and n == x[0, 0].numel() * (len(x) if common else 1):
        remark("ok", f"the bias of {biased} before it is taken off again with the mean")
    levels, texts = zip(*remarks, strict=True)
    return max(levels, key=LEVELS.index), "; ".join(texts)


def _past_batches(n, b, images):
    """Level and text for `n` values of a batch of `b` images, averaged over `images` (None: not known how many)."""
    text = f"{n} value{'s' * (n > 1)} of this batch, averaged with "
    if images is None: return "ok", f"{text}earlier batches"
    noise = _error(n * images / b)
    return "warn" if noise else "ok", f"{text}about {images:.0f} images" + f": {noise}" * bool(noise)


def _one_batch(n, common, rms, scaled):
    """Level and text for `n` values per statistic of this batch.

    `common`: the statistics are the batch's and not an image's; `rms`: of the second moment alone; `scaled`: the
    variances are above eps.
    """
    text = f"{n} value{'s' * (n > 1)} per statistic"
    if n == 1 and rms: return "fail", f"{text}: the output is +-weight whatever the size of the input"
    if n == 1: return "fail", f"{text}: the output is constant (its bias), nothing passes"
    if n == 2 and scaled and not rms: return "fail", f"{text}: outputs are about +-1 whatever the input"
    if common: return ("warn", f"{text}: {_error(n)}") if _error(n) else ("ok", text)
    if (1 if rms else 2) / n <= LOST: return "ok", text
    return "warn", f"{text}, of which {'the scale takes 1' if rms else 'mean and scale take 2'}"


# --- training against evaluation ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainEvalGap:
    """The report of `train_eval_gap`; `str` is a table of `rows` and below it `cause`, a sentence.

    `rows` has one row per layer in the order of the training pass, the model's output last; `channels` maps a norm
    layer's path to its figures per channel, lists: `share`, `mean_off`, `var_ratio`, `reach`.
    """

    rows: Rows
    cause: str
    channels: dict

    def table(self):
        """Header and lines of the table, in words."""
        head = ("layer", "values", "gap", "image", "own", "channel", "share", "mean off", "var ratio", "reach",
                "train", "eval")
        names = ("values", "gap", "image", "own", "channel", "share", "mean_off", "var_ratio", "reach", "train_max",
                 "eval_max")
        return head, [[f"{row['path']} {row['module']}", *(_cell(row.get(name)) for name in names)]
                      for row in self.rows]

    def __str__(self): return f"{text_table(*self.table())}\n{self.cause}"


def _cell(value):
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def train_eval_gap(model, xb, *, batch_size=None, modules=None, tfm=None):
    """Send the same images through the model in training and in evaluation mode and say where the two part.

    In training mode they go in batches of `batch_size`, each from the present state: what is seen is the next training
    step, whichever batch it gets. Afterwards the model is as it was, as after `preflight`. With t and e a layer's
    outputs in training and in evaluation mode, over all images:

        gap         ||t - e|| / ||t||
        image       the median over images of the same, of one image
        own         ||t - f|| / ||t||, f the norm layer's output in evaluation mode on what it got in training mode:
                    its own doing, without what the layers before it have done
        channel     where most of ||t - e||^2 lies, and `share`, how much of it
        mean_off    of this channel: |running mean - mean| / sqrt(var + eps), with mean and var those of all values
                    that reach the norm in evaluation mode
        var_ratio   (running var + eps) / (var + eps)
        reach       the largest |value - running mean| / sqrt(running var + eps)
        limit       sqrt(n - 1), the most that it can be in training, of n values per statistic (None where training
                    too is by running statistics)
        train_max, eval_max         the largest |t| and |e|

    Why this is large for batch norm at small batches: in training no value lies further than sqrt(n - 1) standard
    deviations from the mean of its n. In evaluation it is measured by the running variance, of which a channel that
    is silent for k batches keeps (1 - momentum)^k, down to eps: when it wakes up nothing bounds its output, and every
    layer multiplies what the one before it let through.

    Args:
        model: the model, in any mode.
        xb: a batch of images, best from the validation set, and many.
        batch_size: of the training mode; the size of `xb` if None. The last batch is smaller if it must be.
        modules: what to compare beside the norm layers and the output: types, patterns of paths such as "layer1.*",
            functions `f(path, module)` that say yes, or modules; one or a list.
        tfm: transform of the batch, such as `view_tfm(1, 28, 28)`.

    Returns:
        A `TrainEvalGap`; print it. `rows` have the figures above, None or absent where a layer has none.

    Raises:
        TypeError: an `xb` that is no tensor.
        ValueError: an empty `xb`, layers that are not initialised, a choice of modules that finds nothing.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"train_eval_gap: batch_size is {batch_size!r}; it must be a positive integer, such as 2, or "
                         "None for that of xb")
    model = getattr(model, "_orig_mod", model)
    paths = {m: path for path, m in model.named_modules()}
    norms, _ = norm_layers(model)
    more = {} if modules is None else choose(dict(model.named_modules()), modules, "module", "train_eval_gap")
    layers = dict.fromkeys((*norms, *more.values(), model))
    tallies = {}
    with _undone(model) as restore:
        x = _ready(model, xb, tfm, "train_eval_gap")
        if not len(x): raise ValueError("train_eval_gap got an empty batch; give it images, best many")
        for chunk in x.split(batch_size or len(x)):
            trained = _outputs(model, norms, layers, chunk, True)
            restore()
            evaluated = _outputs(model, norms, layers, chunk, False)
            restore()
            for m, runs in trained.items():                         # a layer that runs twice has two rows
                for i, (run, other) in enumerate(zip(runs, evaluated.get(m, ()), strict=False)):
                    if run[0].shape == other[0].shape: tallies.setdefault((m, i), []).append(_compare(*run, *other))
    rows, channels = Rows(), {}
    for (m, _), parts in tallies.items():
        row, figures = _summed(parts)
        rows.append({"path": paths[m] or "output", "module": type(m).__name__, **row})
        if figures: channels[paths[m]] = figures
    return TrainEvalGap(rows, _cause(rows, channels), channels)


def _outputs(model, norms, layers, x, training):
    """One pass in one mode: `{layer: [(output, more), ...]}`, a pair per run, the model itself last.

    `more` is, of a norm layer in training, its output on the same input in evaluation mode, or None; in evaluation what
    `_input_figures` says, or nothing.
    """
    runs, still = {}, {}

    def enter(m, x):
        if not (training and m.training): return
        m.eval()
        still[m] = m.forward(x)                                     # not m(x): no hook is to see it
        m.train()

    def leave(m, x, y):
        y = first_tensor(y)
        if y is None: return
        # A copy, and the input is looked at now: what follows may write into both.
        more = still.pop(m, None) if training else _input_figures(m, x) if m in norms else {}
        runs.setdefault(m, []).append((y.clone(), more))
    model.train(training)
    with _hooked(norms, enter), _hooked(layers, after=leave): model(x)
    return runs


def _input_figures(m, x):
    """What comes into the norm layer `m` in evaluation, beside what it evaluates by: numbers and `(C,)` tensors."""
    n, own_batch = statistic_groups(m, x).shape[1], not hasattr(m, "running_moments")
    running = running_statistics(m) if own_batch else m.running_moments(len(x))[:2]
    if running is None or running[0].shape != x.shape[1:2]: return {"values": n}
    x, dims, (mean, var), eps = _wide(x), (0, *range(2, x.ndim)), map(_wide, running), _eps(m, x)
    reach = (x.transpose(1, -1) - mean).flatten(0, -2).abs().amax(0) / (var + eps).sqrt()
    return {"values": n, "limit": math.sqrt(n - 1) if own_batch else None, "weight": x.numel(), "mean": x.mean(dims),
            "var": x.var(dims, unbiased=False) + eps, "running": torch.stack((mean, var + eps)), "reach": reach}


def _compare(t, f, e, figures):
    """Sums over one run of a layer on one batch, from its outputs (see `train_eval_gap`): tensors where they lie."""
    t, e = (_wide(u) if u.ndim > 1 else _wide(u).view(-1, 1) for u in (t, e))
    part = {**figures, "t2": t.square().sum(), "d2": (t - e).square().sum((0, *range(2, t.ndim))),      # d2 (C,)
            "images": torch.stack([u.flatten(1).square().sum(1) for u in (t - e, t)], 1),               # (N, 2)
            "train_max": t.abs().max(), "eval_max": e.abs().max()}
    if f is not None: part["own2"] = (t - _wide(f)).square().sum()
    return part


def _relative(d2, t2):
    """sqrt(d2 / t2), 0 where both are 0."""
    return torch.where(d2 == 0, d2, d2 / t2).sqrt()


def _summed(parts):
    """A layer's row from the figures of its batches, and its figures per channel if it has running statistics."""
    first, stacked = parts[0], {k: torch.stack([p[k] for p in parts]) for k, v in parts[0].items()
                               if isinstance(v, torch.Tensor) and k != "images"}
    d2, t2 = stacked["d2"].sum(0), stacked["t2"].sum()
    images = torch.cat([p["images"] for p in parts]).unbind(1)
    channel = int(d2.argmax()) if d2.any() else None
    figures = {"share": _relative(d2, d2.sum()).square()}
    if "running" in first:
        means, (running_mean, running_var) = stacked["mean"], first["running"]
        weight = torch.tensor([p["weight"] for p in parts]).to(means)[:, None]
        weight = weight / weight.sum()
        mean = (weight * means).sum(0)
        var = (weight * (stacked["var"] + (means - mean).square())).sum(0)      # of all batches; eps is in it
        figures.update(mean_off=(running_mean - mean).abs() / var.sqrt(), var_ratio=running_var / var,
                       reach=stacked["reach"].amax(0))
    row = {"values": first.get("values"), "gap": _relative(d2.sum(), t2).item(),
           "image": _relative(*images).median().item(),
           "own": _relative(stacked["own2"].sum(), t2).item() if "own2" in first else None,
           "channel": channel, "limit": first.get("limit") if "own2" in first else None,
           **{k: None if channel is None else v[channel].item() for k, v in figures.items()},
           **{k: stacked[k].max().item() for k in ("train_max", "eval_max")}}
    return row, {k: v.tolist() for k, v in figures.items()} if "running" in first else None


def _cause(rows, channels):
    """In some sentences, where and why the modes part, from the figures alone."""
    if not rows: return "No layer gave tensors of one shape in both modes."
    end, most = rows[-1], max(rows, key=lambda row: row["gap"])
    i = next((i for i, row in enumerate(rows) if not row["gap"] <= 1), None)
    if i is None:
        return (f"The modes agree: the difference at {end['path']} is {end['gap']:.2g} of its size, at no layer more "
                f"than {most['gap']:.2g}.")
    row = rows[i]
    if not math.isfinite(row["gap"]):
        return f"What {row['path']} ({row['module']}) gives is not finite, or all 0 in training mode."
    before = f", after {rows[i - 1]['gap']:.2g} at {rows[i - 1]['path']}" if i else ""
    text = [f"The modes part at {row['path']} ({row['module']}): the difference is {row['gap']:.2g} times the size of "
            f"what training mode gives{before}; at {end['path']} it is {end['gap']:.2g} times, for half of the images "
            f"{end['image']:.2g} or less."]
    if row["path"] in channels:
        ratio = row["var_ratio"]
        fault = ("its running statistics fit" if 0.5 <= ratio <= 2 and row["mean_off"] <= 1 else
                 f"its running mean is {row['mean_off']:.2g} standard deviations off" if 0.5 <= ratio <= 2 else
                 f"its running variance is {max(ratio, 1 / ratio):.2g} times too {'small' if ratio < 1 else 'large'}")
        limit = f" (in training mode {row['limit']:.2g} at most, of {row['values']} values)" if row["limit"] else ""
        text.append(f"{100 * row['share']:.0f} % of it lies in channel {row['channel']}: {fault} for what comes in, "
                    f"and evaluation mode puts it up to {row['reach']:.2g} standard deviations from the mean{limit}.")
    if most["gap"] > 2 * max(row["gap"], end["gap"]): text.append(f"At {most['path']} it is {most['gap']:.2g} times.")
    return " ".join(text)


# --- during training ----------------------------------------------------------------------------------------------

class NormStats(Probe):
    """What norm layers normalise by, batch for batch, beside what they keep for evaluation; see `Probe`.

        stats = NormStats(every=10)                         # all norm layers, or types, or paths such as "4.*"
        run.fit(1, learn, cbs=stats)
        stats.series("4.2", "var", "running_var")           # steps, and for each name a list of lists
        stats.plot("var")

    A row has, with K statistics per batch (batch norms: the channels) or per image (GroupNorm: the groups,
    InstanceNorm: the channels, LayerNorm: 1):

        n               values behind each statistic of the batch
        mean, var       of the batch, K each; where images have their own, means over the images
        running_mean, running_var       K each, after the batch: what evaluation uses (if the layer keeps any)
        scale           weight / std, with std = sqrt(variance + eps) of what this batch was normalised by: what the
                        layer multiplies by. As many as weights, or K if that is more; means over the images
        clamped         channels whose variance a clamp raised (if it normalises by running statistics in training)

    `var` is biased (of RMSNorm: the mean of the squares); torch's and our BatchNorm average the unbiased one,
    n / (n - 1) times as large: at n = 2 `running_var` hovers about twice `var`.

    Args:
        which, **kwargs: as for `Probe`; there is nothing to choose but norm layers.

    Raises:
        ValueError: at the start of a fit, no norm layer, or one whose number of channels can't be told.
    """

    def candidates(self, model): return {path: m for m, path in norm_layers(model)[0].items()}

    def usual(self, model):
        found = self.candidates(model)
        if found: return found
        raise ValueError(f"NormStats found no norm layer in {type(model).__name__}; it needs one of torch's, or one "
                         f"with {PROTOCOL}")

    def layout(self, path, m):
        k, weight = _statistics_of(path, m), getattr(m, "weight", None)
        names = ("mean", "var", "running_mean", "running_var") if running_statistics(m) else ("mean", "var")
        return {**dict.fromkeys(names, k), "scale": k if weight is None else max(k, weight.numel()),
                **({"clamped": None} if _clamps(m) else {})}

    def derived(self, name, value, n): return int(value) if name == "clamped" else value

    def attach(self):
        self._handles = [m.register_forward_hook(partial(self.tap, path), with_kwargs=True)
                         for path, m in self.chosen.items()]

    def detach(self):
        for handle in self._handles: handle.remove()

    @torch.no_grad()
    def tap(self, path, m, args, kwargs, output):
        """The forward hook."""
        x = next(iter((*args, *kwargs.values())))
        k, affine = self.layouts[path]["mean"], self.layouts[path]["scale"]
        groups = statistic_groups(m, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
        var, mean = torch.var_mean(groups, 1, correction=0)                     # (K,) or (N K,)
        if isinstance(m, nn.RMSNorm): var = groups.square().mean(1)
        running = running_statistics(m)
        if hasattr(m, "running_moments"): used = m.running_moments(len(x))[1]
        else: used = running[1] if running and not m.training else var
        scale = (used + _eps(m, x)).rsqrt().view(-1, k).mean(0).repeat_interleave(affine // k)
        if getattr(m, "weight", None) is not None: scale = scale * m.weight.flatten()
        clamped = [(used > running[1]).sum()] if _clamps(m) else []
        numbers = mean.view(-1, k).mean(0), var.view(-1, k).mean(0), *(running or ()), scale, *clamped
        self.take(path, torch.cat([t.reshape(-1).float() for t in numbers]), groups.shape[1])

    def plot(self, name="mean", axes=None, phase="train"):
        """The batch's `name`, "mean" or "var", and the running one over time, a panel per layer with both; the axes.

        Raises:
            ValueError: another name; no layer that was looked at keeps running statistics.
        """
        from runner import plots
        if name not in ("mean", "var"): raise ValueError(f"NormStats.plot: name is {name!r}; choose 'mean' or 'var'")
        kept = [path for path, layout in self.layouts.items() if "running_var" in layout]
        if not kept:
            raise ValueError("NormStats.plot compares with running statistics, and no norm that was looked at keeps "
                             "any; plot a number of your own choice from stats.series(path, name)")
        return plots.plot_channels({path: self.series(path, name, f"running_{name}", phase=phase) for path in kept},
                                   axes, ylabel=name)


def _clamps(m):
    """Whether the variance that the norm layer `m` uses can be told from the one that it keeps."""
    return hasattr(m, "running_moments") and running_statistics(m) is not None


def _statistics_of(path, m):
    """How many statistics the norm layer `m` at `path` has of a batch, or else of each image."""
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)): return 1
    if isinstance(m, nn.GroupNorm): return m.num_groups
    weight = getattr(m, "weight", None)
    channels = next((getattr(m, name) for name in ("num_features", "num_channels", "nf") if hasattr(m, name)),
                    None if weight is None else weight.numel())
    if channels is None:
        raise ValueError(f"NormStats can't tell how many channels the layer {path!r} ({type(m).__name__}) has; give it "
                         "an attribute num_features")
    if isinstance(m, (_BatchNorm, _InstanceNorm)): return channels
    return len(m.statistic_groups(torch.empty(1, channels, 1)))     # of one image
