"""What `nbdev_style.nb_07` adds to the lessons' names: conv layers with a norm, their initialisation, the norms."""

import torch
from torch import nn

import norms
from experiments import models
from nbdev_style import nb_07


def shapes(layer): return [(type(m), getattr(m, "bias", None) is not None) for m in layer]


def test_star_import_gives_what_the_course_s_module_exports():
    names = {}
    exec("from nbdev_style.nb_07 import *", names)
    for name in ("init_cnn_", "init_cnn", "get_learn_run"): assert names[name] is getattr(models, name)
    for name in ("BatchNorm", "LayerNorm", "InstanceNorm", "GroupNorm", "RunningBatchNorm"):
        assert names[name] is getattr(norms, name)
    assert names["conv_layer"] is nb_07.conv_layer
    assert names["conv_layer"] is not models.conv_layer


def test_conv_layer_has_torch_s_batch_norm_unless_told_not_to():
    layer = nb_07.conv_layer(3, 8, 5, 1, leak=0.1, sub=0.4)
    assert shapes(layer) == [(nn.Conv2d, False), (models.GeneralRelu, False), (nn.BatchNorm2d, True)]
    conv, relu, norm = layer
    assert (conv.kernel_size, conv.padding, conv.stride) == ((5, 5), (2, 2), (1, 1))
    assert (relu.leak, relu.sub, relu.maxv) == (0.1, 0.4, None)
    assert (norm.num_features, norm.eps, norm.momentum) == (8, 1e-5, 0.1)
    x = torch.randn(4, 3, 6, 6)
    y = nn.functional.leaky_relu(conv(x), 0.1) - 0.4
    torch.testing.assert_close(layer(x), nn.functional.batch_norm(y, None, None, training=True))
    assert shapes(nb_07.conv_layer(3, 8, bn=False)) == [(nn.Conv2d, True), (models.GeneralRelu, False)]
    assert shapes(nb_07.conv_layer(3, 8, bn=False, norm=norms.BatchNorm)) == shapes(nb_07.conv_layer(3, 8, bn=False))
    assert isinstance(nb_07.conv_layer(3, 8, norm=norms.RunningBatchNorm)[2], norms.RunningBatchNorm)


def test_init_cnn__takes_any_function_to_every_convolution():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.ModuleList([nb_07.conv_layer(2, 3), nn.Conv2d(3, 4, 1)]), nn.Linear(4, 5)

    block, seen = Block(), []
    linear = block.head.weight.clone()

    def f(weight, a):
        seen.append((tuple(weight.shape), a))
        nn.init.constant_(weight, len(seen))
    nb_07.init_cnn_(block, f)
    assert seen == [((3, 2, 3, 3), 0.1), ((4, 3, 1, 1), 0.1)]
    assert (block.inner[1].weight == 2).all()
    assert (block.inner[1].bias == 0).all()
    assert torch.equal(block.head.weight, linear)
