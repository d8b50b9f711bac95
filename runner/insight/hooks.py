"""Forward hooks: `Hook`, `Hooks` and the lesson's `append_stats`."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, SupportsIndex

from torch import Tensor, nn


class Hook:
    """Calls `f(hook, module, input, output)` after each forward of `module`, until `remove()`.

    What `f` wants to keep it keeps on the hook: `hook.stats = ...`. If it returns something other than None that
    takes the output's place, as torch's forward hooks have it.
    """

    stats: Any      # if `f` keeps it there

    def __init__(self, module: nn.Module, f: Callable[["Hook", nn.Module, Any, Any], object]) -> None:
        self.module = module
        self._handle = module.register_forward_hook(partial(f, self))

    def remove(self) -> None:
        """Take the hook off its module; once is enough and twice does no harm."""
        self._handle.remove()


class Hooks(list[Hook]):
    """A list of `Hook`s, one per module, and a context manager that takes them off at its end.

        with Hooks(model, append_stats) as hooks:
            run.fit(1, learn)
            hooks[0].stats              # still there afterwards

    A hook that is deleted from the list is taken off its module first. `remove()` without an argument takes all off
    and leaves them in the list with what they recorded.
    """

    def __init__(self, modules: Iterable[nn.Module], f: Callable[[Hook, nn.Module, Any, Any], object]) -> None:
        super().__init__()
        try:
            for module in modules: self.append(Hook(module, f))
        except BaseException:
            self.remove()  # not half of them
            raise

    def __enter__(self) -> "Hooks": return self

    def __exit__(self, *exc: object) -> None: self.remove()

    def __delitem__(self, i: SupportsIndex | slice) -> None:
        for hook in self[i] if isinstance(i, slice) else [self[i]]: hook.remove()
        super().__delitem__(i)

    def clear(self) -> None: del self[:]

    def pop(self, i: SupportsIndex = -1) -> Hook:
        hook = self[i]
        del self[i]
        return hook

    def remove(self, hook: Hook | None = None) -> None:
        """Take every hook off its module; with an argument, take that one off and out of the list."""
        if hook is None:
            for h in self: h.remove()
        else: del self[self.index(hook)]


def append_stats(hook: Hook, mod: nn.Module, inp: tuple[Any, ...], outp: Tensor) -> None:
    """For `Hooks`: append the output's mean and std, in training only, to `hook.stats`, a pair of lists.

    The entries are 0-dim tensors on the output's device: nothing waits for the device inside a batch.
    """
    if not hasattr(hook, "stats"): hook.stats = ([], [])
    if not mod.training: return
    means, stds = hook.stats
    out = outp.detach()
    means.append(out.mean())
    stds.append(out.std())
