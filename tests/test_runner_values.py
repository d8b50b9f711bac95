"""Plain values of a checkpoint: what goes in comes out the same, of the same type, through torch's careful reader."""

import enum
import io
import random
from array import array
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from runner.checkpoint_files import read
from runner.sources import set_states, sources_of, states_of
from runner.values import decoded, encoded

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool, torch.uint8,
         torch.int64]
VALUES = [
    None, True, 3, -(2 ** 200), 2.5, float("inf"), -0.0, "text \0 ü", b"\x00\xff", 1 + 2j, (), [], {}, set(),
    (1, (2, [3])),
    {"a": {1: [None, 2.5]}, (1, "b"): True, None: 1, 2.5: 0}, OrderedDict([("z", 1), ("a", torch.ones(2))]),
    {1, "a", (2, 3)}, frozenset({1, 2}), deque([1, [2]], 5), deque(), Counter("hello"), array("q", [1, -2]),
    array("f", [0.5]), np.arange(6.0).reshape(2, 3), np.array(3), np.float32(0.5), np.int64(7), np.bool_(True),
    np.array([], dtype=np.int32), torch.float16, torch.device("cpu"), torch.Size([2, 3]), [*range(1000)],
    tuple(range(100)), [0.5, float("inf")] * 50, [2 ** 70] * 50, [1, 2.5] * 50, [True] * 50, (None, *range(50)),
    *(torch.tensor([[1, 0], [2, 3]]).to(t) for t in TYPES), torch.zeros(()), torch.zeros(0, 3), torch.ones(2, 3).T,
    torch.ones(1, 4, 3, 3).to(memory_format=torch.channels_last), torch.eye(3).to_sparse(),
    random.getstate(), np.random.default_rng(1).bit_generator.state, random.Random(3).getstate(),
]


def through(o):
    """Written and read again."""
    memory = io.BytesIO()
    torch.save(encoded(o, "it"), memory)
    memory.seek(0)
    return decoded(read(memory))


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout)
        if a.layout is torch.strided: assert a.stride() == b.stride()
        assert torch.equal(a.to_dense(), b.to_dense())
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
    elif isinstance(a, dict):
        assert [*a] == [*b]
        for k in a: same(a[k], b[k])
    elif isinstance(a, (list, tuple, deque)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True): same(x, y)
    else: assert a == b
    if isinstance(a, deque): assert a.maxlen == b.maxlen


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_a_value_comes_back_as_it_was(value): same(through(value), value)


def test_of_a_subclass_the_base_is_left():
    class Number(float): pass

    pair = namedtuple("pair", "a b")
    for o, base in ((Number(2.5), 2.5), (pair(1, 2), (1, 2)), (defaultdict(list, a=[1]), {"a": [1]}),
                    (nn.Parameter(torch.ones(2)), torch.ones(2)), ({"n": np.float64(1.5)}, {"n": np.float64(1.5)})):
        same(through(o), base)


def test_of_a_view_the_rest_of_its_memory_is_not_written():
    memory = io.BytesIO()
    torch.save(encoded({"batch": torch.zeros(1000, 1000)[3:5]}, "it"), memory)
    assert memory.tell() < 20_000


def test_what_comes_back_is_new_each_time():
    read = encoded({"list": [1], "tensor": torch.zeros(2), "array": np.zeros(2)}, "it")
    first = decoded(read)
    first["list"].append(2)
    first["tensor"] += 1
    first["array"] += 1
    same(decoded(read), {"list": [1], "tensor": torch.zeros(2), "array": np.zeros(2)})


class Choice(enum.IntEnum): ONE = 1


@pytest.mark.parametrize(("value", "told"), [
    ({"a": [0, lambda: 1]}, r"it\['a'\]\[1\] is .*function"), (object(), "it is .*object"),
    (Choice.ONE, "it is .*Choice"),
    (nn.Linear(1, 1), "it is .*Linear"), (torch.Generator(), "it is .*Generator"), ({object(): 1}, "a key of it is"),
    (np.array([object()]), "it is .*ndarray"), (deque([io.BytesIO()]), r"it\[0\] is .*BytesIO"),
], ids=lambda v: type(v).__name__)
def test_what_can_not_be_written_is_named(value, told):
    with pytest.raises(TypeError, match=told + r".*a checkpoint holds tensors, numbers, strings"): encoded(value, "it")


# --- sources of random numbers ----------------------------------------------------------------------------------------

class Slots:
    __slots__ = ("rng",)

    def __init__(self): self.rng = random.Random(1)


class Noise:
    def __init__(self): self.rng = np.random.default_rng(2)

    def __call__(self, x): return x + self.rng.normal()


def test_sources_are_found_where_they_are():
    g, module = torch.Generator(), nn.Sequential(nn.Linear(1, 1))
    module[0].g = g
    old, bits = np.random.RandomState(3), np.random.PCG64(4)
    noise = Noise()
    closure = (lambda r: lambda: r.random())(random.Random(5))
    parts = {"a": [old, (bits,)], "f": partial(noise, 1), "m": noise.__call__, "s": Slots(), "c": closure}
    found = sources_of(model=module, parts=parts, again=parts)
    assert found["model._modules['0'].g"] is g
    assert [*found.values()].count(g) == 1
    assert {id(o) for o in found.values()} == {id(g), id(old), id(bits), id(noise.rng), id(parts["s"].rng),
                                               id(closure.__closure__[0].cell_contents)}
    assert sources_of(many=[random.Random()] * 2000, tensor=torch.zeros(3), none=None) == {}


def test_states_of_sources_are_put_back():
    sources = {"torch": torch.Generator(), "python": random.Random(1), "old": np.random.RandomState(1),
               "new": np.random.default_rng(1), "bits": np.random.MT19937(1)}
    sources["old"].normal()     # keeps half of a pair for the next time

    def draw():
        return [torch.rand(2, generator=sources["torch"]).tolist(), sources["python"].gauss(0, 1),
                sources["old"].normal(), sources["new"].normal(), int(sources["bits"].random_raw()), random.gauss(0, 1),
                float(np.random.normal()), torch.rand(()).item()]
    states = through(states_of(sources))
    first = draw()
    assert draw() != first
    set_states(states, sources)
    assert draw() == first
    set_states(states, {})      # the common ones alone
    assert draw()[5:] == first[5:]


def test_a_loop_of_references_and_many_objects_end():
    a, b = Noise(), Noise()
    a.other, b.other = b, a
    assert len(sources_of(a=a)) == 2
    deep = [random.Random()]
    for _ in range(200): deep = [deep]
    assert sources_of(deep=deep) == {}
