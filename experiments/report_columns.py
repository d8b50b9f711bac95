"""What the columns of the report's tables say, each in a line, and how it names a module."""

from torch import nn

NETWORK_COLUMNS = {"path": "the module's name in the model, as in its state dict",
                   "module": "its class; of a container from its first module to its last"}

PREFLIGHT_COLUMNS = {
    "layer": "the norm's path in the network", "norm": "its class",
    "images": "how many images came in, as a batch of training has them",
    "map": "height and width of what came in",
    "values per statistic": "how many values each mean and variance of a batch rests on",
    "what follows": "what that many values mean for training and for evaluation"}

GAP_COLUMNS = {
    "layer": "the layer's path and class; the last row is the network's output",
    "values": "how many values each statistic of a training batch rests on",
    "gap": "size of the difference between the two modes, as a multiple of the size of training's output",
    "image": "the same for one image: the median over the images",
    "own": "the part of the gap that this norm makes itself, on the same input",
    "channel": "the channel in which most of the squared difference lies",
    "share": "how much of it lies there, 0 to 1",
    "mean off": "how far this channel's running mean is from the mean that comes in, in standard deviations",
    "var ratio": "its running variance over the variance that comes in: 1 is right, far below 1 blows values up",
    "reach": "how many standard deviations a value lies from the mean in evaluation mode, at most",
    "train": "the largest size of an output in training mode", "eval": "the same in evaluation mode"}


def described(m: nn.Module) -> str:
    """The class of `m`; of a container "Conv2d to BatchNorm2d", its first module to its last."""
    inner = list(m.children()) if isinstance(m, nn.Sequential) else []
    names = [type(inner[i]).__name__ for i in (0, -1)] if inner else [type(m).__name__]
    return " to ".join(dict.fromkeys(names))
