"""`Probe`: what is looked at, at which batches, and where the numbers go; the base of all that measures in a fit."""

from array import array
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from runner.batches import length_of
from runner.events import listify
from runner.insight.choice import choose
from runner.insight.store import Store
from runner.ranks import Ranks, ranks_of
from runner.rows import Rows
from runner.stateful import Stateful, column
from runner.states import holds_compiled

BLOCK = 256             # measured batches that lie on the device before one transfer brings them to the host
PHASES = ("train", "valid")


class Probe(Stateful):
    """Measures chosen things at chosen batches: the base of the callbacks in `stats` and `norm_stats`, and of your own.

    Inside a batch nothing waits for the device: the numbers go into a block there, and between batches a full block
    comes to the host in one transfer. Taps are set for a measured batch alone and are gone when it ends, however it
    ends. A model out of `torch.compile` would pass taps by, so a measured batch of it runs as it was written;
    `Runner(compile=True)` is refused. The memory is known, and printed, before the first batch; where it would
    be more than `max_mb`, fewer batches are measured, and the line says so. Loaders without a length are measured until
    that is full. A second fit starts anew, for it may have another model: copy `rows` first.

    A subclass says what there is to choose from (`candidates`, `usual`), what a row holds (`layout`), how to tap a
    batch (`attach`, from which `take` is called) and how to let go of it (`detach`).

    Args:
        which: what to look at: types, patterns of paths such as "layer1.*", functions `f(path, thing)` that say yes,
            or the things themselves; one or a list. None means `usual`.
        phases: "train", "valid" or both.
        every: measure every so many batches, counted through the fit in training and anew in each validation.
        first: measure so many batches at the beginning of training in any case.
        max_mb: the most memory for the numbers of a fit, in MB (10^6 bytes).
        verbose: print a line about number and memory at the beginning of a fit.

    `paths` lists what was looked at, `series` gives one number over time and `rows` all numbers as plain rows. `sees`
    says of which images: with `Distributed` each process sees its own part of a batch, and rank 0 prints that.

    Raises:
        ValueError: an argument out of its range; at the start of a fit, a choice that finds nothing.
        CompileError: at the start of a fit, a runner with `compile=True`.
    """

    _order = 110        # after whatever changes the batch, and after what measures on a copy of the model
    fit_only = True
    _saved = "batch", "stride", "head", "most", "_block", "layouts"
    kind: str = "module"
    possible: tuple[str, ...] = PHASES

    def __init__(self, which: Any = None, *, phases: str | Sequence[str] = "train", every: int = 1, first: int = 10,
                 max_mb: float = 64, verbose: bool = True) -> None:
        name = type(self).__name__
        self.phases: tuple[str, ...] = tuple(listify(phases))
        if not self.phases or set(self.phases) - set(self.possible):
            raise ValueError(f"{name}: phases is {phases!r}; there is {' and '.join(map(repr, self.possible))}, one or "
                             "a list")
        for arg, value, least in (("every", every, 1), ("first", first, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: {arg} is {value!r}; it must be an integer of at least {least}")
        if not max_mb > 0: raise ValueError(f"{name}: max_mb is {max_mb!r}; it must be a positive number of MB")
        self.which, self.every, self.first, self.max_mb, self.verbose = which, every, first, max_mb, verbose
        self.chosen: dict[str, Any] = {}            # of the kind: modules, or parameters
        self.sees = ""                              # of what images the numbers of the fit are
        self._stores: dict[str, Store] = {}
        self._tags, self.measuring = array("q"), False

    # --- what a subclass says ---------------------------------------------------------------------------------

    def candidates(self, model: nn.Module) -> dict[str, Any]:
        """All that there is to choose from: `{path: thing}`."""
        return dict(model.named_modules())

    def usual(self, model: nn.Module) -> dict[str, Any]:
        """What is looked at if nothing was chosen: `{path: thing}`."""
        return self.candidates(model)

    def layout(self, path: str, thing: Any) -> dict[str, int | None]:
        """What a row of `thing` holds, in order: each name with the length of its list, None for a single number."""
        raise NotImplementedError

    def attach(self) -> None:
        """Tap the batch that begins; the taps call `take`."""

    def detach(self) -> None:
        """Take the taps off."""

    def derived(self, name: str, values: Any, n: int) -> Any:
        """What a row has under `name`, from the number or list that was stored; `n` is what `take` was given."""
        return values

    def _seen(self, ranks: Ranks) -> str:
        """What `sees` says of a fit over these processes."""
        return "all images" if ranks.size == 1 else f"the part of {ranks}"

    # --- measuring --------------------------------------------------------------------------------------------

    def begin_fit(self) -> None:
        model = getattr(self.model, "_orig_mod", self.model)        # torch.compile's wrapper has it under this name
        self._refuse(model)
        self.chosen = self.usual(model) if self.which is None else choose(
            self.candidates(model), self.which, self.kind, type(self).__name__)
        self.layouts = {path: self.layout(path, thing) for path, thing in self.chosen.items()}
        self._compiled, self.sees = holds_compiled(self.model), self._seen(ranks_of(self.run))
        widths = {path: _width(layout) for path, layout in self.layouts.items()}
        rows = self._plan(8 * 4 + sum(8 + 4 * width for width in widths.values()))
        self._block = max(1, min(BLOCK, rows))
        self._stores = {path: Store(width, self._block) for path, width in widths.items()}
        self._tags, self.measuring, self.batch = array("q"), False, 0

    def follow(self) -> None:
        """Look, from here on, at what has come to be a candidate since the fit began, as an unfrozen parameter has."""
        model = getattr(self.model, "_orig_mod", self.model)
        if self.which is None: found = self.usual(model)
        else: found = choose({**self.chosen, **self.candidates(model)}, self.which, self.kind, type(self).__name__)
        new = {path: thing for path, thing in found.items() if path not in self.chosen}
        self.chosen.update(new)
        new = {path: thing for path, thing in new.items() if path not in self._stores}
        for path, thing in new.items():
            self.layouts[path] = self.layout(path, thing)
            self._stores[path] = store = Store(_width(self.layouts[path]), self._block)
            store.skip(len(self._tags) // 4)
        if new and self.verbose:
            print(f"{type(self).__name__}: {len(new)} {self.kind}{'s' * (len(new) > 1)} more from epoch "
                  f"{self.run.epoch}", flush=True)

    def _plan(self, row_bytes: int) -> int:
        """Settle `stride` and `head`, this fit's `every` and `first`; returns how many batches will be measured."""
        loaders = zip(PHASES, (self.data.train_dl, self.data.valid_dl), strict=True)
        lengths = {phase: length_of(dl) for phase, dl in loaders}
        self.most = most = max(1, int(self.max_mb * 1e6 / row_bytes))
        if any(lengths[phase] is None for phase in self.phases):
            self.stride, self.head = self.every, self.first
            if self.verbose: print(self._announcement(most, row_bytes, "at most "), flush=True)
            return most
        batches = {phase: (n or 0) * (self.epochs if phase == "train" else 1) for phase, n in lengths.items()}

        def measured(phase: str) -> int:
            n, times = batches[phase], 1 if phase == "train" else self.epochs
            first = min(self.head, n) if phase == "train" else 0
            return times * (first + len(range(-(-first // self.stride) * self.stride, n, self.stride)))

        def total() -> int: return sum(map(measured, self.phases))
        self.stride, self.head = self.every, min(self.first, most)
        if total() > most: self.stride = max(self.stride, -(-sum(batches.values()) // most))
        while total() > most and self.stride < max(batches.values()): self.stride += 1
        if self.verbose: print(self._announcement(total(), row_bytes), flush=True)
        return total()

    def _announcement(self, rows: int, row_bytes: int, at_most: str = "") -> str:
        things = f"{len(self.chosen)} {self.kind}{'s' * (len(self.chosen) > 1)}"
        which = "every batch" if self.stride == 1 else f"one batch in {self.stride}" + (
            f" and the first {self.head}" if self.head and "train" in self.phases else "")
        less = f" (not one in {self.every}: max_mb is {self.max_mb:g})" * (self.stride > self.every)
        return (f"{type(self).__name__}: {things}, {' and '.join(self.phases)}, {which}{less}: {at_most}{rows:,} "
                f"batches, {rows * row_bytes / 1e6:.2g} MB" + (f", {self.sees}" if ranks_of(self.run).size > 1 else ""))

    def _refuse(self, model: nn.Module) -> None:
        if getattr(self.run, "compiled_step", None) is not None:      # that of compile=True
            from runner.compiled import CompileError
            raise CompileError(f"{type(self).__name__} taps the modules in each measured batch, and a compiled step "
                               "passes taps by; fit without compile=True")
        scripted = [path for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        if scripted:
            raise ValueError(f"{type(self).__name__}: the module {scripted[0]!r} is scripted and passes taps by; use "
                             "the model as it was before torch.jit")

    def begin_epoch(self) -> None: self.batch = 0

    def begin_validate(self) -> None: self.batch = 0

    def begin_batch(self) -> None:
        run = self.run
        if run.in_train:
            if (run.n_iter % self.stride and run.n_iter >= self.head) or "train" not in self.phases: return
        elif self.batch % self.stride or "valid" not in self.phases: return
        if len(self._tags) >= 4 * self.most: return         # more batches than the loaders had told
        self._tags.extend((0 if run.in_train else 1, run.epoch, self.batch, run.n_iter))
        for store in self._stores.values(): store.begin()
        self.measuring = True
        self._stance = torch.compiler.set_stance("force_eager") if self._compiled else None
        self.attach()

    def take(self, path: str, values: list[float] | Tensor, n: int) -> None:
        """Keep `values`, laid out as `layout` says, as the row of `path`: a list, or a 1-D tensor where it lies.

        `n` (at least 1) says of how many numbers they are the statistics. What is measured twice in a batch, as a
        module that runs twice, keeps the later one.
        """
        self._stores[path].put(values, n)

    def after_batch(self) -> None:
        self.batch += 1
        if self.measuring: self._let_go()

    def after_fit(self) -> None:
        if self.measuring: self._let_go()

    def _let_go(self) -> None:
        self.measuring = False
        try: self.detach()
        finally:
            if self._stance is not None: self._stance.__exit__(None, None, None)
            for store in self._stores.values(): store.end()

    def state_dict(self) -> dict[str, Any]:
        """What was measured, in columns, and of what."""
        return {**super().state_dict(), "tags": column(self._tags, "q"),
                "stores": {path: (column(store.sizes, "q"), store.rows()) for path, store in self._stores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after what was measured then, with what has come to be looked at since the fit began."""
        super().load_state_dict(state)
        self._tags = array("q", state["tags"].tolist())
        candidates = self.candidates(getattr(self.model, "_orig_mod", self.model))
        self._stores = {path: store for path, store in self._stores.items() if path in state["stores"]}
        for path, (sizes, rows) in state["stores"].items():
            if path not in self._stores: self._stores[path] = Store(_width(self.layouts[path]), self._block)
            if path in candidates: self.chosen.setdefault(path, candidates[path])
            self._stores[path].load(sizes, rows)

    # --- what was measured ------------------------------------------------------------------------------------

    @property
    def paths(self) -> list[str]:
        """What was looked at, in the model's order."""
        return list(self._stores)

    @property
    def rows(self) -> Rows:
        """All that was measured, as plain dicts: phase, epoch, batch (in its pass), step, module, n, then the numbers.

        `step` is the number of training batches done before. What did not run in a batch has no row there.
        """
        found: list[tuple[int, dict[str, Any]]] = []
        for path in self._stores:
            ran, values = self._values(path, ["n", *self.layouts[path]])
            found += [(i, self._tagged(i) | {self.kind: path} | {name: column[k] for name, column in values.items()})
                      for k, i in enumerate(ran)]
        return Rows(row for _, row in sorted(found, key=lambda pair: pair[0]))  # stable: in a batch as the model has it

    @overload
    def series(self, path: str, name: str, /, *, phase: str = "train") -> tuple[list[int], list[Any]]: ...

    @overload
    def series(self, path: str, name: str, second: str, /, *,
               phase: str = "train") -> tuple[list[int], list[Any], list[Any]]: ...

    @overload
    def series(self, path: str, name: str, second: str, third: str, /, *,
               phase: str = "train") -> tuple[list[int], list[Any], list[Any], list[Any]]: ...

    @overload
    def series(self, path: str, *names: str, phase: str = "train") -> tuple[list[Any], ...]: ...

    def series(self, path: str, *names: str, phase: str = "train") -> tuple[list[Any], ...]:
        """Numbers of `path` over time: `(steps, values)`, with another list of values for each further name."""
        if path not in self._stores:
            raise KeyError(f"{type(self).__name__} did not look at {path!r}; it looked at: {', '.join(self._stores)}")
        known = ["n", *self.layouts[path]]
        for name in names:
            if name not in known:
                raise KeyError(f"{type(self).__name__} has no {name!r}; choose of: {', '.join(known)}")
        ran, values = self._values(path, names)
        kept = [(k, tags["step"]) for k, i in enumerate(ran) if (tags := self._tagged(i))["phase"] == phase]
        return [step for _, step in kept], *([values[name][k] for k, _ in kept] for name in names)

    def _tagged(self, i: int) -> dict[str, Any]:
        phase, epoch, batch, step = self._tags[4 * i:4 * i + 4]
        return {"phase": PHASES[phase], "epoch": epoch, "batch": batch, "step": step}

    def _values(self, path: str, names: Sequence[str]) -> tuple[list[int], dict[str, list[Any]]]:
        """The measured batches in which `path` ran, and for each name its values in them."""
        store, layout = self._stores[path], self.layouts[path]
        rows = store.rows()
        ran = [i for i in range(len(rows)) if store.sizes[i]]
        pieces = dict(zip(layout, rows[ran].split([k or 1 for k in layout.values()], 1), strict=True))

        def column(name: str) -> list[Any]:
            if name == "n": return [store.sizes[i] for i in ran]
            values = (pieces[name][:, 0] if layout[name] is None else pieces[name]).tolist()
            return [self.derived(name, v, store.sizes[i]) for v, i in zip(values, ran, strict=True)]
        return ran, {name: column(name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes the numbers along, and not the model."""
        return {**super().__getstate__(), "chosen": {}}


def _width(layout: dict[str, int | None]) -> int: return sum(k or 1 for k in layout.values())
