"""What `preflight` says of one norm layer, from its input and its settings."""

import math

import torch
from torch import Tensor, nn

from runner.insight.layers import (
    eps_of,
    running_moments,
    running_statistics,
    shared,
    statistic_groups,
    takes,
    wide,
)
from runner.processes import processes_to_come, world_size

LEVELS = ("ok", "warn", "fail")
Pooled = tuple[Tensor, Tensor, int, int]    # of several processes: mean, variance, images, values per channel

# A variance taken over n normal values has the relative standard error sqrt(2 / (n - 1)); above a quarter, which is
# below 33 values, the scale of a channel is mostly chance. (Values of one image are alike, so that the count flatters
# large maps: take it for the most that a statistic can rest on.)
NOISY = 0.25
# Statistics of an image's own are the same in training and evaluation and not noise; but of n values mean and scale are
# taken away for good. Above a quarter of them, which is below 8 values, there is a warning.
LOST = 0.25
# Norms that train by running statistics without averaging their gradient lack most of batch norm's gradient. Five of
# them in a row do well; with twelve, in a residual network at batch size 2, they fall behind batch norm (the lab's
# records). Where between the two it begins is not known. With group norm behind each no difference to batch norm was
# seen.
DEEP = 8
LONG = 4        # batches' images in such a norm's memory, at least: below, the batch's share is a large one


def _error(n: float) -> str:
    """In words, by how much a variance over `n` values is off; empty if that is little."""
    error = math.sqrt(2 / (n - 1)) if n > 1 else math.inf
    return f"the variance has a standard error of {100 * error:.0f} %" if error > NOISY else ""


def judge(m: nn.Module, x: Tensor, before: tuple[Tensor, Tensor] | None, was_frozen: bool,
           biased: str | None, over: Pooled | None, lacking: int = 0,
           uncentred: str | None = None) -> tuple[str, str]:
    """Level and text for the norm layer `m`, which has just run on `x` with running statistics `before` it.

    `lacking`: how many norms of the model have `lacks_gradient`. `was_frozen`: whether it was in evaluation mode in a
    model in training mode; `biased`: the path of the layer that added a bias to `x` last; `over`: the moments of the
    step, if they are of several processes, and their counts; `uncentred`: the path of the layer that gave `x`, if its
    weights may give it a mean.
    """
    if not m.training and before: return "ok", "in evaluation mode in training too: its running statistics stay"
    groups, eps = wide(statistic_groups(m, x)), eps_of(m, x)
    n, common, what, ranks = groups.shape[1], shared(m, x), takes(m), world_size()
    var = groups.square().mean(1) if what == "mean square" else groups.var(1, unbiased=False)
    images, of = len(x), ""
    if over is not None: (_, var, images, n), of = over, f" of {getattr(m, 'ranks', 1)} processes"
    running, after = running_moments(m, images), running_statistics(m)
    if running: var = running[1]
    live = var[var > 0]                                             # a ReLU leaves channels without any value
    median = live.median().item() if len(live) else 0.0
    moved = getattr(m, "moved_from", None)
    if running: remarks = [_past_batches(n, images, running[2], of)]
    else: remarks = [_one_batch(n, common, what, eps < median and moved is None, of)]

    def remark(level: str, text: str) -> None: remarks.append((level, text))
    if (behind := getattr(m, "image_groups", None)) is not None:
        level, text = _one_batch(behind(x).shape[1], False, "mean and variance", True, " of an image")
        if level != "ok": remark(level, f"behind it {text}")
    if moved is not None:
        remark("ok", f"from step {moved} on the output is moved towards running statistics; the gradient rests on the "
                     "batch alone")
    if lacking >= DEEP and lacks_gradient(m) and running and (running[2] or 0) > LONG * images:
        remark("warn", f"{lacking} such layers get the gradient through their statistics by this batch's share alone, "
                       "and so deep a network learns less by that than with batch norm: take SteadyBatchNorm or "
                       "GroupNorm, with WSConv2d")
    if running and after and (held := int((var > getattr(m, "unclamped_var", after[1])).sum())):
        remark("ok", f"a clamp holds the variance of {held} of {len(var)} channels")
    if (n > 1 or what == "mean square") and eps > median:
        remark("warn", f"eps {eps:g} is above the variance (median {median:.2g}): the input is hardly scaled")
    if before and after and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        remark("warn", "the running statistics don't move in training (momentum 0?), and evaluation uses them")
    elif after and not common:
        remark("warn", "evaluation normalises by running statistics and training by each image's own")
    if common and not (after or running):
        remark("warn", "no running statistics: in evaluation an output depends on the rest of its batch")
    if common and ranks > 1 and over is None and not isinstance(m, nn.SyncBatchNorm):
        first = "" if hasattr(m, "ranks") else "convert_norms(model, norms.BatchNorm) and "
        remark("warn", f"each of {ranks} processes normalises by its own share of {len(x)} image{'s' * (len(x) > 1)}: "
                       f"{first}sync_norms(model)")
    if common and (to_come := processes_to_come()) > 1 and getattr(m, "synced", None) is None:
        first = "" if hasattr(m, "ranks") else "convert_norms(model, norms.BatchNorm) and "
        remark("warn", f"{to_come} processes were started, and each is to normalise by its own part of the batch's "
                       f"{len(x)} image{'s' * (len(x) > 1)}: {first}sync_norms(model)")
    if was_frozen: remark("warn", "it was in evaluation mode, and model.train() at every epoch ends that")
    if uncentred is not None and getattr(m, "wants_centred", False):
        remark("warn", f"it takes no mean away, and the weights of module {uncentred} before it give one: "
                       "convert_convs(model, CentredConv2d)")
    # A statistic of one channel: its mean takes in the whole of the channel's bias.
    centres = what == "mean and variance" and not running
    if biased is not None and centres and groups.shape[1] == x[0, 0].numel() * (len(x) if common else 1):
        remark("ok", f"the bias of module {biased} before it has no effect: the mean takes it off")
    levels, texts = zip(*remarks, strict=True)
    return max(levels, key=LEVELS.index), "; ".join(texts)


def lacks_gradient(m: nn.Module) -> bool:
    """Whether `m` says that it trains by running statistics, doesn't average the gradient through them, and has no
    norm of each image behind them.
    """
    return m.training and getattr(m, "average_backward", None) is False and getattr(m, "image_groups", None) is None


def _past_batches(n: int, b: int, images: float | None, of: str) -> tuple[str, str]:
    """Level and text for `n` values of a batch of `b` images, averaged over `images` (None: not known how many).

    `of` names the processes, if there are several.
    """
    text = f"{n} value{'s' * (n > 1)} of this batch{of}, averaged with "
    if images is None: return "ok", f"{text}earlier batches"
    noise = _error(n * images / b)
    return "warn" if noise else "ok", f"{text}about {images:.0f} images" + f": {noise}" * bool(noise)


def _one_batch(n: int, common: bool, what: str, scaled: bool, of: str) -> tuple[str, str]:
    """Level and text for `n` values per statistic of this batch.

    `common`: the statistics are the batch's and not an image's; `what` is taken of the values, as by `takes`; `scaled`:
    the variances are above eps; `of` names the processes, if there are several.
    """
    text, centred = f"{n} value{'s' * (n > 1)}{of} per statistic", what == "mean and variance"
    if n == 1 and centred: return "fail", f"{text}: the output is constant (its bias), nothing passes"
    if n == 1 and what == "variance": return "fail", f"{text}: the variance is 0, so all is divided by sqrt(eps)"
    if n == 1 and scaled: return "fail", f"{text}: nothing but the input's sign passes, whatever its size"
    if n == 2 and scaled and centred: return "fail", f"{text}: outputs are about +-1 whatever the input"
    if common: return ("warn", f"{text}: {_error(n)}") if _error(n) else ("ok", text)
    if (2 if centred else 1) / n <= LOST: return "ok", text
    return "warn", f"{text}, of which {'mean and scale take 2' if centred else 'the scale takes 1'}"
