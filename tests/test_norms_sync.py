"""Norms whose statistics are taken over several processes: what `ranks_of_norms` checks, each a test here."""

import copy
import importlib.util
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from norms import BatchNorm, GroupNorm, LayerNorm, RunningBatchNorm, sync_norms, unsync_norms

TWO = ["without_a_group_it_is_the_norm", "what_was_compiled_before_is_right_in_the_group", "as_one_process_by_ddp",
       "accumulation_with_no_sync_and_buffers_broadcast_before_the_backward", "derivatives_of_all_kinds",
       "an_averaged_gradient_has_no_second_on_any_rank",
       "compiled_whole", "half_precision_and_ragged_and_empty_shares", "one_value_over_all_ranks_is_as_the_norm_alone",
       "evaluation_asks_nobody", "what_is_not_finite_stays_in_its_channel", "a_constant_is_exact",
       "copies_pickles_and_conversions_keep_the_mark", "recalibration_is_over_all_images", "sharded_by_fsdp2",
       "preflight_counts_over_the_ranks", "random_programs"]
THREE = ["a_given_group_is_asked_alone", "random_programs"]
PEERS = {"in_accelerate": "accelerate", "in_lightning": "lightning"}


def launched(forks, names, size):
    here = Path(__file__).parent
    code = (f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here)!r}]\n"
            f"import json, ranks_of_norms\nprint('\\n' + json.dumps(ranks_of_norms.launch({names!r}, {size})))")
    done = forks.run("-c", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_two(forks): return launched(forks, TWO, 2)


@pytest.fixture(scope="module")
def on_three(forks): return launched(forks, THREE, 3)


@pytest.fixture(scope="module")
def beside_peers(forks): return launched(forks, [n for n, p in PEERS.items() if importlib.util.find_spec(p)], 2)


@pytest.mark.parametrize("name", TWO)
def test_on_two_ranks(on_two, name): assert not on_two[name], "\n".join(on_two[name])


@pytest.mark.parametrize("name", THREE)
def test_on_three_ranks(on_three, name): assert not on_three[name], "\n".join(on_three[name])


@pytest.mark.parametrize("name", PEERS)
def test_within_another_trainer(request, name):
    pytest.importorskip(PEERS[name])
    errors = request.getfixturevalue("beside_peers")[name]
    assert not errors, "\n".join(errors)


# --- without other processes --------------------------------------------------------------------------------------

def test_the_result_says_which_are_synchronised_and_which_left_alone():
    model = nn.Sequential(BatchNorm(2), nn.Sequential(RunningBatchNorm(2), GroupNorm(1, 2)), nn.BatchNorm2d(2))
    model.append(model[0])                                          # in two places, and one norm
    before = list(model.state_dict())
    done = sync_norms(model)
    assert done == {"BatchNorm": 1, "RunningBatchNorm": 1}
    assert done.left_alone == {"GroupNorm": 1, "BatchNorm2d": 1}
    assert repr(done) == ("Counter({'BatchNorm': 1, 'RunningBatchNorm': 1}), "
                          "left alone: {'GroupNorm': 1, 'BatchNorm2d': 1}")
    assert pickle.loads(pickle.dumps(done)).left_alone == done.left_alone
    assert list(model.state_dict()) == before
    assert repr(model[0]) == "BatchNorm(2, mom=0.1, eps=1e-05, synced)"
    assert sync_norms(model) == done                                # again: no matter
    assert unsync_norms(model) == {"BatchNorm": 1, "RunningBatchNorm": 1}
    assert unsync_norms(model) == {}
    assert repr(model[0]) == "BatchNorm(2, mom=0.1, eps=1e-05)"


def test_a_norm_itself_may_be_given():
    norm = RunningBatchNorm(2)
    assert sync_norms(norm) == {"RunningBatchNorm": 1}
    assert norm.ranks == 1                                          # there is no group
    assert not norm.over_ranks()


@pytest.mark.parametrize(("model", "left"), [(nn.Sequential(nn.Linear(2, 2)), ""),
                                             (nn.Sequential(LayerNorm(), nn.BatchNorm1d(2)),
                                              r" \(it leaves BatchNorm1d, LayerNorm alone\)")])
def test_nothing_to_synchronise_is_an_error(model, left):
    with pytest.raises(ValueError, match=f"found no norm to synchronise in Sequential{left}; it needs BatchNorm or "
                                         r"RunningBatchNorm .*convert_norms\(model, norms.BatchNorm\)"):
        sync_norms(model)


def test_what_is_no_group_is_refused():
    norm = BatchNorm(2)
    with pytest.raises(TypeError, match=r"got group=2: it needs a torch.distributed.ProcessGroup, .* or None for all"):
        sync_norms(norm, 2)
    assert norm.synced is None


def test_a_norm_of_one_s_own_shares_its_moments():
    from norms.running_norm import RunningNorm
    from norms.shares import batch_moments

    class Centred(RunningNorm):
        def __init__(self, nf): super().__init__(nf, 1e-5, {})

        def forward(self, x): return batch_moments(self, x).centred

    class Doubled:      # what two processes with equal batches, one above the other by 2, would answer
        key = ""

        def size(self): return 2

        def merge(self, mean, var, images, n, then=None):
            return mean + 1, var + 1, torch.tensor([2 * images, 2 * n, 2])

    norm, x = Centred(2), torch.randn(3, 2)
    torch.testing.assert_close(norm(x), x - x.mean(0))
    norm.synced = Doubled()
    moments = batch_moments(norm, x)
    torch.testing.assert_close(moments.centred, x - x.mean(0) - 1)
    assert (moments.images, moments.n) == (6, 6)
    assert norm.pooled_moments(x)[2:] == (6, 6)


def test_a_module_of_an_earlier_version_is_not_synchronised():
    norm = BatchNorm(2)
    del norm.__dict__["synced"]
    assert copy.deepcopy(norm).ranks == 1
    norm(torch.randn(2, 2))
