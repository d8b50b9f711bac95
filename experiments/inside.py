"""Look inside a short training: every picture, and one page that lays them out.

Trains the five-layer network of small-batch with one norm for some hundred steps and writes into the run folder the
pictures, the figures as CSV, and report.html: what each norm's statistics rest on, losses and rates, activations,
gradients, updates, what the norms normalise by, and how far training and evaluation part. The page needs no network.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from experiments import settings
from experiments.data import load_data
from experiments.errors import pick
from experiments.figures import heading, plural, seeds_and_device
from experiments.image_data import ImageData
from experiments.models import CHANNELS, get_runner
from experiments.published.small_batch import NORMS, build
from experiments.report import Report
from experiments.report_columns import GAP_COLUMNS, NETWORK_COLUMNS, PREFLIGHT_COLUMNS, described
from experiments.results import Row, versions
from experiments.run_folder import RunFolder
from experiments.spoken import fits
from experiments.training import check_batch_size, train
from experiments.verdict import Result
from runner import (
    ActivationStats,
    BatchTransformXCallback,
    CudaCallback,
    DataBunch,
    Dataset,
    GradientStats,
    LR_Find,
    NormStats,
    ParameterStats,
    Rows,
    TerminateOnNonFinite,
    get_dls,
    preflight,
    train_eval_gap,
    view_tfm,
)
from runner.insight.explain import explanation

if TYPE_CHECKING:
    from runner.insight.plots import Axes

VALID_IMAGES = 2000         # at most as many validate: this is a look and not a measurement
GAP_IMAGES = 500            # of them go through the network in both modes
SEARCH_STEPS = 500          # of the rate finder, at most


@dataclass
class Config(settings.ImageSettings):
    """Settings of the look.

    `norm` is a name in `small_batch.NORMS`. About `steps` training steps are taken (whole epochs), one batch in `every`
    is measured and the first ten. The first of `seeds` is looked into; of the others only the losses are drawn.

    Raises:
        InputError: a value that makes no sense.
    """

    norm: str = "BatchNorm2d"
    batch_size: int = 2
    lr: float = 0.4
    steps: int = 1000
    every: int = 5

    def __post_init__(self) -> None:
        self.norm = pick(self.norm, NORMS, "norm")
        for name in ("batch_size", "steps", "every"): settings.positive(name.replace("_", " "), getattr(self, name))
        settings.positive_number("lr", self.lr, 0.4)
        super().__post_init__()


def run(config: Config) -> Result:
    """Look before, during and after the training, write the run folder and its report: a `Result`."""
    images = load_data(config.data, config.data_dir, config.limit)
    check_batch_size(config.batch_size, images, "--batch-size")
    epochs = math.ceil(config.steps * config.batch_size / len(images.train))
    images.train = Dataset(*images.train[:max(config.batch_size, config.steps * config.batch_size // epochs)])
    images.valid = Dataset(*images.valid[:VALID_IMAGES])
    folder = RunFolder(config.out, "inside", config, {"data": str(images)}, resume=config.resume)
    header = heading(
        images, f"conv layers {CHANNELS}, pool, linear, norm {config.norm}",
        f"run:     batch size {config.batch_size}, lr {config.lr}, {plural(epochs, 'epoch')} of "
        f"{len(images.train) // config.batch_size:,} steps, {seeds_and_device(config)}")
    print(fits(header), flush=True)
    summary = _looked(folder) if folder.resumed else None
    if summary is None:
        with folder.reporting(): summary = look(config, images, epochs, folder)
    n = len([*folder.path.glob("*.png")])
    lays_out = f"lays out {plural(n, 'picture')}; they and the figures lie beside it" if n else "has it all"
    print(fits(f"\n{summary['words']}\n{folder.path / 'report.html'} {lays_out}."), flush=True)
    return Result(summary["rows"], None, summary["words"], folder.path)


def _looked(folder: RunFolder) -> dict[str, Any] | None:
    """What `summary.json` holds of a look that has ended; None if it is not there, or not whole: then all is anew."""
    try: summary: dict[str, Any] = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError): return None
    return summary if isinstance(summary, dict) and {"rows", "words"} <= set(summary) else None


def look(config: Config, images: ImageData, epochs: int, folder: RunFolder) -> dict[str, Any]:
    """Go through all stages and write the report: what `summary.json` holds."""
    report = Report(f"{config.norm} at batch size {config.batch_size}, lr {config.lr}",
                    f"The five-layer network on {images.name}, seed {config.seeds[0]}, torch {versions()['torch']}")
    look = Look(config, images, epochs, folder, report)
    look.before()
    look.training()
    look.inside()
    look.after()
    look.loop()
    with folder.new_files() as new: report.write(new / "report.html")
    summary = {"experiment": "inside", "data": images.name, "rows": look.rows, "updates": look.updates,
               "gap": look.gap, "words": look.words}
    folder.write_json("summary.json", summary)
    # Until here they stand for the trained networks and all that was seen in them.
    for seed in config.seeds: folder.remove_checkpoint(config.norm, seed)
    return summary


class Look:
    """One look: what is seen at each stage goes into the report, and into files beside it."""

    def __init__(self, config: Config, images: ImageData, epochs: int, folder: RunFolder, report: Report) -> None:
        self.config, self.images, self.epochs, self.folder, self.report = config, images, epochs, folder, report
        self.seed, self.view = config.seeds[0], view_tfm(1, 28, 28)
        self.updates: dict[str, float] = {}     # median ratio of update to weight in the second half
        self.gap: str | None = None             # why modes part

    def picture(self, name: str, drawn: "Axes | list[Axes]", caption: str) -> None:
        """Save the figures of the axes `drawn` as `name`.png, or of several as `name`-1.png and so on, and show them.
        """
        from runner import plots
        with self.folder.new_files() as new: names = [p.name for p in plots.save_pages(drawn, new / f"{name}.png")]
        for i, made in enumerate(names):
            self.report.picture(self.folder.path / made, caption + f" Page {i + 1} of {len(names)}." * (len(names) > 1))

    def csv(self, rows: Rows, name: str) -> None:
        """Write `rows` as `name`.csv."""
        with self.folder.new_files() as new: rows.to_csv(new / f"{name}.csv")

    def data(self) -> DataBunch:
        """New loaders, of one order for every seed."""
        order = torch.Generator().manual_seed(self.seed)
        train_dl, valid_dl = get_dls(self.images.train, self.images.valid, self.config.batch_size, drop_last=True,
                                     generator=order)
        return DataBunch(train_dl, valid_dl, self.images.c)

    # --- the stages -------------------------------------------------------------------------------------------

    def before(self) -> None:
        """What the norms' statistics rest on, and the rate finder."""
        data, model = self.data(), build(self.config.norm, self.seed, self.images.c)
        found = preflight(model, data.train_dl, tfm=self.view)
        print(f"\n{found}\n", flush=True)
        self.report.section("The network").table(
            ["path", "module"], [[path, described(m)] for path, m in model.named_modules() if path],
            "The names that all pictures and tables use.", words=(0, 1), explained=NETWORK_COLUMNS)
        self.report.section("Before training: what each statistic rests on")
        if found.findings:
            self.report.table(["", "layer", "norm", "images", "map", "values per statistic", "what follows"], [
                [f.level, f.path, f.module, f.batch, "x".join(map(str, f.map)), f.values, f.text]
                for f in found.findings], words=(0, 1, 2, 6),
                warn=[i for i, f in enumerate(found.findings) if f.level != "ok"], explained=PREFLIGHT_COLUMNS)
        else: self.report.text("The network has no norm layer.")

        finder = LR_Find(max(2, min(SEARCH_STEPS, self.config.steps)))
        learn, runner = get_runner(model.to(self.config.device), data, self.config.lr,
                                   [CudaCallback(self.config.device), BatchTransformXCallback(self.view)])
        self.report.section("Rate finder")
        try: runner.fit(self.epochs, learn, cbs=finder)
        except ValueError as e:                     # a norm that refuses its input, which the preflight has said
            self.report.text(f"There was nothing to search in: {e}", warn=True)
            return
        try: said = f"Its suggestion is {finder.suggestion:.2g}."
        except RuntimeError: said = "The loss did not fall clearly enough for a suggestion."
        self.picture("lr_find", finder.plot(), "The training loss while the rate grows exponentially, each batch and "
                     f"smoothed. {said} This training takes {self.config.lr}.")

    def training(self) -> None:
        """Train every seed, the first under observation; losses and rates."""
        config, every = self.config, self.config.every
        self.activations, self.gradients = ActivationStats(every=every), GradientStats(every=every)
        self.parameters = ParameterStats(every=every)
        self.norms = NormStats(every=every) if NORMS[config.norm] else None
        self.guard = TerminateOnNonFinite(self.folder.path / "diverged.pt")
        looking = [cb for cb in (self.activations, self.gradients, self.parameters, self.norms, self.guard) if cb]
        self.rows: list[Row] = []
        metrics: list[Row] = []
        curves: list[tuple[Sequence[int], list[float]]] = []
        for seed in config.seeds:
            model = build(config.norm, seed, self.images.c)
            row = {"norm": config.norm, "batch_size": config.batch_size, "lr": config.lr, "epochs": self.epochs,
                   "seed": seed}
            epochs, row, losses = train(model, self.images, row, config.device, f"{config.norm}, seed {seed}",
                                        looking if seed == self.seed else [TerminateOnNonFinite()], drop_last=True,
                                        checkpoint=self.folder.checkpoint(config.norm, seed))
            metrics += epochs
            self.folder.write_metrics(metrics)
            self.rows.append(row)
            curves.append((range(len(losses)), losses))
            if seed == self.seed:
                self.model, self.history = model, epochs
                titles = {path: f"{path} {described(m)}" for path, m in model.named_modules()}
                self.activations.titles = self.gradients.titles = titles
        self.run = self.activations.run
        self.csv(self.run.recorder.rows, "losses")
        first = self.rows[0]
        self.words = (f"Training loss {first['train_loss']:.3g}, validation loss {first['valid_loss']:.3g}, validation "
                      f"accuracy {first['valid_accuracy']:.3f} (seed {self.seed}).")
        if first["status"] == "failed":
            self.words = (f"{config.norm} can't be trained at batch size {config.batch_size}: {first['error']}. Take a "
                          "larger --batch-size, or a --norm that needs no second image, such as RunningBatchNorm or "
                          "GroupNorm.")
        if self.guard.record: self.words = self.guard.record["report"]
        self.report.section("Training").text(self.words, warn=first["status"] != "ok")

        from runner import plots
        recorder = self.run.recorder
        if not recorder.losses: return
        _, (left, right) = plots.figure(2, width=5.5, height=3.6)
        plots.plot_losses(recorder.losses, ax=left, valid=[r["valid_loss"] for r in self.history])
        plots.plot_rates(recorder.lrs, ax=right)
        self.picture("losses", [left, right], "Training loss of each batch and smoothed, the validation loss at each "
                     "epoch's end, and the learning rate.")
        if len(curves) > 1:
            width = max(1, len(recorder.losses) // 25)
            self.picture("seeds", plots.plot_runs({config.norm: curves}, smooth=width,
                                                  ylabel=f"training loss, mean of {width}"),
                         "The training loss of every seed, faint, and their mean: other weights, another order of the "
                         "images.")

    def inside(self) -> None:
        """Activations, gradients, updates, norms."""
        if not self.run.recorder.losses:
            self.report.section("Activations, gradients, updates").text(
                "No step was taken, so there is nothing to see. Before training above says which layer is why.")
            return
        near = f"{self.activations.near:g}"
        self.report.section("Activations")
        self.picture("activations", self.activations.plot(),
                     "Mean and standard deviation of what each layer puts out (path in the network), at the first "
                     "measured steps and at all.")
        self.picture("activation_histograms", self.activations.plot_histograms(), "How the values of each layer are "
                     "distributed, over time: the darker, the more values; white is none.")
        self.picture("near_zero", self.activations.plot_near_zero(), f"The share of values with |x| of at most {near}: "
                     "units that say nothing, whatever their sign.")
        self.report.section("Gradients and updates")
        self.picture("gradients", self.gradients.plot(), "Mean and standard deviation of the loss's gradient with "
                     "respect to what each layer puts out, on logarithmic axes; that of the means has both signs and "
                     "is linear around 0.")
        self.picture("gradient_histograms", self.gradients.plot_histograms(), "How these gradients are distributed, "
                     "over time; triangles mark steps that reach beyond the picture.")
        self.picture("updates", self.parameters.plot_kinds(), "How far a step moves each parameter, relative to its "
                     "size (norms, logarithmic). A rule of thumb wants about 1e-3. A bias that was 0 has no size: the "
                     "ratio is infinite, a triangle at the upper edge; of one that stands still it is 0, at the lower.")
        for path in self.parameters.paths:
            if not path.endswith(".weight"): continue
            _, ratios = self.parameters.series(path, "ratio")
            if ratios: self.updates[path] = statistics.median(ratios[len(ratios) // 2:])
        stats = {"activations": self.activations, "gradients": self.gradients, "parameters": self.parameters}
        if self.norms: self.norm_layers(self.norms)
        for name, probe in stats.items():
            rows = probe.rows
            for r in rows: del r["hist"]
            self.csv(rows, name)

    def norm_layers(self, norms: NormStats) -> None:
        """What the norms normalise by, against what they keep."""
        from runner import plots
        self.report.section("What the norms normalise by")
        values = {path: sorted(set(norms.series(path, "n")[1])) for path in norms.paths}
        self.report.text("Values behind each statistic of a batch: " + "; ".join(
            f"{path}: {', '.join(f'{n:,}' for n in ns)}" for path, ns in values.items()) + ".")
        if all("running_var" in norms.layouts[path] for path in norms.paths):
            for what, words in (("mean", "means"), ("var", "variances")):
                self.picture(f"norm_{words}", norms.plot(what), f"The batches' {words} and the running ones, which "
                             "evaluation uses, over the channels: median and the band from 10 to 90 %" + (
                             ", and the least channel, all logarithmic: where the running variance of a channel falls "
                             "far below the batch's, evaluation blows it up." if what == "var" else "."))
        scales = {path: norms.series(path, "scale") for path in norms.paths}
        medians = {path: (steps, [statistics.median(map(abs, v)) for v in values])
                   for path, (steps, values) in scales.items()}
        self.picture("norm_scales", plots.plot_layers(medians, ylabel="median of |weight / std|"),
                     "What each norm multiplies its input by, weight / std: the median over its channels.")
        clamped = {path: norms.series(path, "clamped") for path in norms.paths if "clamped" in norms.layouts[path]}
        if clamped:
            hits = {path: [step for step, n in zip(*at, strict=True) if n] for path, at in clamped.items()}
            said = [f"{path} up to step {steps[-1]}" for path, steps in hits.items() if steps]
            self.report.text("The clamp raised a variance in " + ("; ".join(said) or "no layer") + ".")
        rows = [{k: v for k, v in r.items() if not isinstance(v, list)} for r in norms.rows]
        self.csv(Rows(rows), "norms")

    def after(self) -> None:
        """How far training and evaluation part."""
        xb = self.images.valid[:GAP_IMAGES][0].to(self.config.device)
        self.report.section("Training mode against evaluation mode")
        try: gap = train_eval_gap(self.model, xb, batch_size=self.config.batch_size, tfm=self.view)
        except ValueError as e:                     # a norm that refuses its input, which the preflight has said
            self.report.text(str(e), warn=True)
            return
        print(f"\n{gap}", flush=True)
        self.gap = gap.cause
        self.report.text(f"The same {len(xb)} validation images in both modes, in training mode in batches of "
                         f"{self.config.batch_size}. {gap.cause}")
        header, rows = gap.table()
        self.report.table(header, rows, words=(0,), explained=GAP_COLUMNS)

    def loop(self) -> None:
        """Who answered which event."""
        self.report.section("The loop").code(explanation(self.run.cbs))


# --- the command line ---------------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments inside`."""
    parser.add_argument("--norm", default="BatchNorm2d", metavar="NORM", help=f"one of {', '.join(NORMS)}")
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="training batch size (default: 2)")
    parser.add_argument("--lr", type=float, default=0.4, metavar="X", help="learning rate (default: 0.4)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="training steps (default: 1000)")
    parser.add_argument("--every", type=int, default=5, metavar="N",
                        help="measure one batch in N, and the first ten (default: 5)")
    settings.add_image_arguments(parser, "inside", study=False)


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status is 0: a training that diverges is worth a look."""
    run(Config(**settings.from_args(args)))
    return 0
