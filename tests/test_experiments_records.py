"""Committed records: the pages' tables come from them, and each says of itself what the present code says of it."""

import importlib
import itertools
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from experiments import EXPERIMENTS, table
from experiments.__main__ import main
from experiments.beyond.recipes import BEST, RUNNING, TRIED
from experiments.errors import InputError
from experiments.figures import by_arm, finite
from experiments.results import read_summary
from experiments.study.statistics import holm, interval

ROOT = Path(__file__).parent.parent
PAGES = {name: ROOT / name for name in ("experiments/README.md", "experiments/lab/README.md",
                                        "experiments/lab/five-layer.md", "experiments/bench/README.md")}
SPEED = " ".join((ROOT / "experiments" / "bench" / "README.md").read_text().split())
TABLES = [(page, name) for page, file in PAGES.items()
          for name in re.findall(r"^<!-- results: (.*) -->$", file.read_text(), re.MULTILINE)]


def records_of(beginning):
    """The names of the committed records that begin so, in order."""
    return sorted(file.stem for file in (ROOT / "experiments" / "results").glob(f"{beginning}_*.json"))


# mark in a page: its records, where they are more than one or go by another name
SEVERAL = {"best": ["best_running", "best_group"],
           "best-tuning": ["best_tuning_running", "best_tuning_running_more", "best_tuning_group"],
           # A cell that was measured twice is in the table once.
           "lab-resnet-imagenette": [name for name in records_of("lab_resnet") if name != "lab_resnet_bn32"],
           "lab-pair": records_of("lab_pair"),
           "lab-cifar10": records_of("lab_cifar10"),
           "lab-five-mnist": records_of("lab_five_mnist"),
           "lab-five-layer": records_of("lab_five_layer"),
           "lab": [name for name in records_of("lab") if name != "lab_leads"]}
WHOLE = {"MNIST": 50_000, "Fashion-MNIST": 50_000, "breast cancer": 455, "imagenette64": 8522, "cifar10": 45_000}


def due(file, record):
    """How many training images a record must have: all, but of all norms at all batch sizes, which takes many hours."""
    return 12_000 if file.startswith("lab_five_layer") else WHOLE[record["data"]]


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_the_pages_tables_are_generated_from_the_committed_records(page, name):
    text = PAGES[page].read_text()
    of, short = name.removesuffix("-overview"), name.endswith("-overview")
    files = [f"experiments/results/{f}.json" for f in SEVERAL.get(of, [of.replace("-", "_")])]
    records = [read_summary(ROOT / f) for f in files]
    assert table.insert(text, table.markdown(records, overview=short), name) == text, (
        f"run: python -m experiments table {' '.join(files)} --into {page} --name {name}{' --overview' * short}")
    for file, r in zip(files, records, strict=True):
        assert r.get("machine") or (r["complete"] and r["train_images"] == due(Path(file).stem, r))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_verdict_in_a_record_is_the_present_criterion_s(name):
    module = importlib.import_module(EXPERIMENTS[name][0])
    for file in SEVERAL.get(name, [name.replace("-", "_")]):
        record = read_summary(ROOT / "experiments" / "results" / f"{file}.json")
        assert (record["experiment"], record["complete"], record["train_images"]) == (name, True, due(file, record))
        said = module.judge(record["rows"], record["data"], record["train_images"]).record()
        assert {name: record[name] for name in said} == said


def test_what_the_page_says_of_whole_epochs_is_in_their_records():
    now, before = ({r["arm"]: r for r in read_summary(ROOT / f"experiments/results/{name}.json")["rows"]}
                   for name in ("bench_whole", "bench_whole_earlier"))
    lesson, ours = "lesson's way, RunningBatchNorm", "ours, RunningBatchNorm"
    seconds = [runs[lesson]["ms"] * 25 for runs in (now, before)]
    fastest = now[ours]["ms_range"][0] * 25
    assert (f"({seconds[0]:.0f} s for the whole epoch; on the quiet day of the other parts it had been "
            f"{seconds[1]:.0f} s, of which the fastest of our three epochs, {fastest:.0f} s, would be ") in SPEED
    assert f"would be {fastest / seconds[1]:.2f})".replace("0.", ".") in SPEED


def test_what_the_page_says_of_a_checkpoint_is_in_its_record():
    rows = read_summary(ROOT / "experiments/results/bench_checkpoint.json")["rows"]
    few, many = (r for r in rows if r["arm"] == "a write")
    assert few["setting"] == "1,000 steps of history"
    assert (f"One write takes {few['ms']:.0f} ms with 1,000 steps of history behind it and {many['ms']:.0f} ms with "
            f"25,000, {few['share']:.2%} and {many['share']:.2%} of the 30 seconds".replace("%", " %")) in SPEED
    assert max(few["share"], many["share"]) < 0.01


def accuracies_of(mark):
    """The test accuracies of a table's records: `{(norm, batch size): {seed: accuracy}}`."""
    accs = {}
    for name in SEVERAL[mark]:
        for row in read_summary(ROOT / "experiments" / "results" / f"{name}.json")["rows"]:
            accs.setdefault((row["norm"], row["batch_size"]), {})[row["seed"]] = row["test_accuracy"]
    return accs


def unknown_figures(said, accs, at_least):
    """Figures in `said`, `at_least` so many, that are no mean of a cell of `accs`, no difference of two, and no end of
    its interval.
    """
    known = {statistics.mean(found.values()) for found in accs.values()}
    for first, second in itertools.permutations(accs, 2):
        d = [accs[first][seed] - accs[second][seed] for seed in sorted(accs[first].keys() & accs[second].keys())]
        known |= {statistics.mean(d), *interval(d)[:2]}
    written = re.findall(r"0\.\d{3,}", said)
    assert len(written) >= at_least
    return [figure for figure in written if figure not in {f"{abs(x):.{len(figure) - 2}f}" for x in known}]


def test_every_figure_in_the_lab_s_sentences_is_in_its_records():
    page, accs = PAGES["experiments/lab/README.md"].read_text(), accuracies_of("lab-resnet-imagenette")
    assert unknown_figures(page.partition("What the figures say")[2].partition("Made by")[0], accs, 40) == []
    twice = [page.partition("was measured on both: ")[2][:6], page.partition("lab_resnet_bn32.json`) and ")[2][:6]]
    cpu = read_summary(ROOT / "experiments" / "results" / "lab_resnet_bn32.json")["rows"]
    assert twice == [f"{x:.4f}" for x in (statistics.mean(r["test_accuracy"] for r in cpu),
                                          statistics.mean(accs["BatchNorm2d", 32].values()))]
    cifar = page.partition("## CIFAR-10, residual network")[2].partition("\n## ")[0].partition(table.END)[2]
    assert unknown_figures(cifar, accuracies_of("lab-cifar10"), 10) == []


def test_what_the_lab_s_page_says_of_the_five_layer_network_is_in_the_records():
    accs = accuracies_of("lab-five-mnist")
    steady, running = accs["SteadyBatchNorm", 2], accs["RunningBatchNorm", 2]
    assert len(steady) == 200
    assert min(steady.values()) > 0.976
    low, high, _ = interval([steady[seed] - running[seed] for seed in running])
    d = statistics.mean(steady[seed] - running[seed] for seed in running)
    words = " ".join(PAGES["experiments/lab/README.md"].read_text().split())
    for said in ("no run of the 200 with SteadyBatchNorm has less than 0.976",
                 f"it is {d:.4f} above (95 % interval {low:.4f} to {high:.4f}, {len(running)} seeds)",
                 f"RunningBatchNorm's lowest run has {min(running.values()):.3f}"):
        assert said in words


def test_what_the_pages_say_of_speed_is_in_the_records():
    rows = {r["arm"]: r for r in read_summary(ROOT / "experiments" / "results" / "bench_lab.json")["rows"]}
    words = " ".join(PAGES["experiments/lab/README.md"].read_text().split())
    plain, steady = (rows[f"the lab's loop, {norm}"] for norm in ("BatchNorm2d", "SteadyBatchNorm"))
    ends = [f"{low:.2f} to {high:.2f}" for low, high in (plain["ratio_quartiles"], steady["ratio_quartiles"])]
    one = {norm: f"{rows[norm]['ratio']:.1f}" for norm in ("RunningBatchNorm", "SteadyBatchNorm", "GroupNorm",
                                                           "GroupNorm-WS", "SteadyBatchNorm-WS")}
    for said in (f"takes {plain['ratio']:.2f} of a loop written by hand with BatchNorm2d (middle half {ends[0]}) and "
                 f"{steady['ratio']:.2f} with SteadyBatchNorm ({ends[1]})",
                 f"RunningBatchNorm {one['RunningBatchNorm']}, SteadyBatchNorm {one['SteadyBatchNorm']}, GroupNorm "
                 f"{one['GroupNorm']}, GroupNorm with weight standardization {one['GroupNorm-WS']}, SteadyBatchNorm "
                 f"with it {one['SteadyBatchNorm-WS']},"):
        assert said in words


def test_the_differences_on_the_lab_s_page_are_those_of_its_records():
    accs = accuracies_of("lab-resnet-imagenette")
    lines = re.findall(r"^\| (\S+) at (\d+) - (\S+) at (\d+) \| (\S+) \| (\S+) to (\S+) \| (\d+) of (\d+) \|$",
                       PAGES["experiments/lab/README.md"].read_text(), re.MULTILINE)
    assert len(lines) >= 8
    for one, b, other, c, *said in lines:
        first, second = accs[one, int(b)], accs[other, int(c)]
        d = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
        low, high, _ = interval(d)
        found = [*(f"{x:+.4f}" for x in (statistics.mean(d), low, high)), str(sum(x > 0 for x in d)), str(len(d))]
        assert found == said, (one, b, other, c)


def five_layer():
    """The test accuracies of the records of all norms on the five-layer network: `{(norm, batch size, schedule):
    {seed: accuracy}}`; a run without a figure has 0.
    """
    accs = {}
    for name in SEVERAL["lab-five-layer"]:
        for row in read_summary(ROOT / "experiments" / "results" / f"{name}.json")["rows"]:
            cell = row["norm"], row["batch_size"], row["schedule"]
            accs.setdefault(cell, {})[row["seed"]] = finite(row["test_accuracy"])
    return accs


def test_the_differences_on_the_five_layer_page_are_those_of_its_records():
    accs = five_layer()
    cell = r"(\S+) at (\d+), (\S+)"
    lines = re.findall(rf"^\| {cell} - {cell} \| (\S+) \| (\S+) to (\S+) \| (\d+) of (\d+) \|$",
                       PAGES["experiments/lab/five-layer.md"].read_text(), re.MULTILINE)
    assert len(lines) >= 8
    for one, b, schedule, other, c, another, *said in lines:
        first, second = accs[one, int(b), schedule], accs[other, int(c), another]
        assert first.keys() == second.keys()
        d = [first[seed] - second[seed] for seed in sorted(first)]
        low, high, _ = interval(d)
        found = [*(f"{x:+.4f}" for x in (statistics.mean(d), low, high)), str(sum(x > 0 for x in d)), str(len(d))]
        assert found == said, (one, b, schedule, other, c, another)


def test_every_figure_in_the_five_layer_page_s_sentences_is_in_its_records():
    accs, page = five_layer(), PAGES["experiments/lab/five-layer.md"].read_text()
    said = page.partition("## What they say")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \S+ at \d+, .* \| (\S+) \| (\S+) to (\S+) \| \d+ of 24 \|$", page, re.MULTILINE)
    known = {*map(statistics.mean, map(dict.values, accs.values())), *(abs(float(x)) for row in rows for x in row)}
    written = re.findall(r"0\.\d{2,}", said)
    assert len(written) >= 20
    before = read_summary(ROOT / "experiments" / "results" / "lab_five_layer_b2.json")["before"]
    most = max(row["valid_accuracy"] for row in before if row["norm"] == "BatchNorm2d")
    assert f"(to {most:.3f} at most, in the tuning)" in " ".join(said.split())
    known.add(most)
    assert [x for x in written if x not in {f"{k:.{len(x) - 2}f}" for k in known}] == []
    words = " ".join(said.split())
    means = {cell: f"{statistics.mean(found.values()):.3f}" for cell, found in accs.items()}
    for form in ("at its best {BatchNorm2d warm-up} with warm-up and {BatchNorm2d constant} without",
                 "at 2 BatchChannelNorm has {BatchChannelNorm warm-up}, BatchRenorm {BatchRenorm warm-up}, "
                 "MomentumBatchNorm {MomentumBatchNorm warm-up}",
                 "{RunningBatchNorm warm-up} with warm-up and {RunningBatchNorm constant} without",
                 "GroupNorm has {GroupNorm warm-up}",
                 "without any norm has {none warm-up}, and the best, EvoNormS0, {EvoNormS0 warm-up}"):
        assert form.format_map({f"{norm} {s}": mean for (norm, b, s), mean in means.items() if b == 2}) in words
    for form in ("whatever the image ({BatchNorm warm-up})",
                 "BatchRenorm has {BatchRenorm warm-up}, and MomentumBatchNorm diverges",
                 "At batch size 1 it has {RunningBatchNorm warm-up} and {RunningBatchNorm constant}, and again no run",
                 "At 1 EvoNormS0 is the best, too ({EvoNormS0 warm-up})", "GroupNorm has {GroupNorm warm-up} at 1",
                 "but {SteadyBatchNorm warm-up} at 1", "and {SteadyBatchNorm constant} at a constant rate"):
        assert form.format_map({f"{norm} {s}": mean for (norm, b, s), mean in means.items() if b == 1}) in words
    batch, running = ({b: mean for (norm, b, s), mean in means.items() if (norm, s) == (name, "warm-up")}
                      for name in ("BatchNorm2d", "RunningBatchNorm"))
    assert f"{batch[4]} at 4, {batch[8]} at 8, {batch[16]} at 16 and 32, {batch[64]} at 64" in words
    assert batch[16] == batch[32]
    assert (f"{running[1]} at 1, {running[2]} at 2, {running[4]} at 4, {running[8]} at 8, {running[32]} at 32 and "
            f"{running[64]} at 64") in words
    assert {mean for (norm, b, s), mean in means.items() if (norm, s, b > 1) == ("SteadyBatchNorm", "warm-up", True)
            } == {"0.964", "0.965", "0.966"}
    for size in 1, 2:
        arms = {norm: statistics.mean(found.values()) for (norm, b, s), found in accs.items()
                if (b, s) == (size, "warm-up")}
        assert max(arms, key=arms.get) == "EvoNormS0"
        assert min(min(accs["RunningBatchNorm", size, s].values()) for s in ("constant", "warm-up")) > 0.15
    rows = read_summary(ROOT / "experiments" / "results" / "lab_five_layer_b1.json")["rows"]
    for norm, status in ("BatchNorm2d", "failed"), ("MomentumBatchNorm", "diverged"):
        assert {row["status"] for row in rows if row["norm"] == norm} == {status}
    rates = {(row["norm"], row["schedule"]): row["rate"] for row in rows}
    assert sum(rate == min(rates.values()) for rate in rates.values()) > len(rates) / 2


def test_at_batch_size_2_the_lab_s_best_stays_ahead_after_holm_s_correction():
    accs = {norm: found for (norm, b), found in accuracies_of("lab-resnet-imagenette").items() if b == 2}
    best = accs.pop("SteadyBatchNorm-WS")
    assert f"over the {len(accs)} norms at 2" in " ".join(PAGES["experiments/lab/README.md"].read_text().split())
    ps = dict(zip(accs, holm([stats.ttest_rel(*zip(*((best[s], found[s]) for s in best.keys() & found.keys()),
                                                   strict=True)).pvalue for found in accs.values()]), strict=True))
    assert {norm for norm, p in ps.items() if p >= 0.05} == {"GroupNorm-WS"}
    assert {norm for norm, p in ps.items() if 0.03 < p < 0.05} == {"MABN", "BatchChannelNorm-WS"}


def test_what_the_lab_says_of_its_two_best_with_fresh_seeds_is_in_their_records():
    cells = [(norm, 2) for norm in ("SteadyBatchNorm-WS", "GroupNorm-WS")]
    fresh, first = accuracies_of("lab-pair"), accuracies_of("lab-resnet-imagenette")
    for cell in cells:
        assert fresh[cell].keys() == {*range(5, 30)}        # none of the first five
        assert first[cell].keys() == {*range(5)}
    rates = [{row["norm"]: row["rate"] for name in SEVERAL[mark]
              for row in read_summary(ROOT / "experiments" / "results" / f"{name}.json")["rows"]
              if (row["norm"], row["batch_size"]) in cells} for mark in ("lab-pair", "lab-resnet-imagenette")]
    assert rates[0] == rates[1]
    words = " ".join(PAGES["experiments/lab/README.md"].read_text().split())
    more = [fresh[cells[0]][seed] - fresh[cells[1]][seed] for seed in range(5, 30)]
    whole = [first[cells[0]][seed] - first[cells[1]][seed] for seed in range(5)] + more
    (a, b, _), (c, d, _) = interval(more), interval(whole)
    assert (f"is {statistics.mean(more):.4f} above GroupNorm-WS ({a:.4f} to {b:.4f}), in {sum(x > 0 for x in more)} of "
            f"25 seeds; over all 30 it is {statistics.mean(whole):.4f} ({c:.4f} to {d:.4f})") in words


def test_table_goes_between_its_marks_and_nowhere_else():
    a, b, end = table.begin("a"), table.begin("b"), table.END
    text = f"x\n{a}\nold\n{end}\ny\n{b}\nold\n{end}\nz"
    assert table.insert(text, "new", "b") == f"x\n{a}\nold\n{end}\ny\n{b}\nnew\n{end}\nz"
    with pytest.raises(InputError, match="there is no place for the table"): table.insert(text, "new", "c")


def test_tables_of_different_data_are_not_mixed():
    one = {"experiment": "small-batch", "data": "MNIST", "train_images": 50_000, "rows": []}
    with pytest.raises(InputError, match="these runs are of different data"):
        table.markdown([one, {**one, "train_images": 100}])
    with pytest.raises(InputError, match="have no rows"): table.markdown([one])
    with pytest.raises(InputError, match=r"different experiments, \['bench', 'small-batch'\]; name runs of one"):
        table.markdown([one, {"rows": [], "machine": ""}])
    with pytest.raises(InputError, match=r"^small-batch has one table only; --overview is for lab$"):
        table.markdown([one], overview=True)
    with pytest.raises(InputError, match="unknown experiment 'small-bath': did you mean 'small-batch'"):
        table.markdown([{**one, "experiment": "small-bath"}])


def test_table_goes_by_the_experiment_s_name_unless_told(tmp_path, capsys):
    record, readme = str(ROOT / "experiments" / "results" / "small_batch.json"), tmp_path / "README.md"
    empty = "\n".join([table.begin("small-batch"), table.END, table.begin("mine"), table.END])
    readme.write_text(empty)
    assert main(["table", record, "--into", str(readme)]) == 0
    made = table.markdown([read_summary(record)])
    assert readme.read_text() == table.insert(empty, made, "small-batch")
    assert main(["table", record, "--into", str(readme), "--name", "mine"]) == 0
    assert readme.read_text().count(made) == 2
    capsys.readouterr()
    files = [str(ROOT / "experiments" / "results" / f"lab_cifar10_{name}.json") for name in ("bn2", "h100_bn32")]
    assert main(["table", *files, "--overview"]) == 0
    records = [read_summary(f) for f in files]
    assert capsys.readouterr().out == table.markdown(records, overview=True) + "\n"
    half = {**records[0], "complete": False, "verdict": "Not complete: 3 of 4"}
    assert table.markdown([half, records[1]], overview=True).endswith(" |\n\nNot complete: 3 of 4")


def test_tuning_and_final_runs_of_the_best_recipe_belong_together():
    rows = {name: [row for f in SEVERAL[name] for row in read_summary(ROOT / f"experiments/results/{f}.json")["rows"]]
            for name in ("best", "best-tuning")}
    tried = by_arm(rows["best-tuning"])
    assert set(tried) == {str(r) for r in TRIED}
    assert not any("test_accuracy" in row for row in rows["best-tuning"])
    means = {name: statistics.mean(r["valid_accuracy"] for r in arm) for name, arm in tried.items()}
    for norm, recipe in BEST.items():                  # chosen by the validation images, with seeds of their own
        assert max((name for name in means if name.startswith(norm)), key=means.get) == str(recipe)
    arms = [*BEST.values(), replace(BEST[RUNNING], batch_size=1)]
    assert set(by_arm(rows["best"])) == set(map(str, arms))
    assert not {r["seed"] for r in rows["best"]} & {r["seed"] for r in rows["best-tuning"]}


def test_what_the_pages_say_of_natural_images_is_in_the_records():
    found = {cell: statistics.mean(accs.values()) for cell, accs in accuracies_of("lab-resnet-imagenette").items()}
    mean = {cell: f"{accuracy:.3f}" for cell, accuracy in found.items()}
    running, batch, steady, group = (mean[norm, 2] for norm in (
        "RunningBatchNorm", "BatchNorm2d", "SteadyBatchNorm-WS", "GroupNorm-WS"))
    first = " ".join((ROOT / "README.md").read_text().split())
    for said in (f"({float(running):.2f} and {float(batch):.2f} at batch size 2)",
                 f"what works there ({float(steady):.2f})"):
        assert said in first
    norms = " ".join((ROOT / "norms" / "README.md").read_text().split())
    assert f"accuracy of {mean['RunningBatchNorm-averaged', 2]} with it and {running} without" in norms
    words = " ".join(PAGES["experiments/README.md"].read_text().split())
    for said in (f"at 2 it has a test accuracy of {running}, and batch norm {batch}.",
                 f"SteadyBatchNorm has {steady} and GroupNorm {group} at batch size 2. That is above batch norm at "
                 f"batch size 32 ({mean['BatchNorm2d', 32]})."):
        assert said in words
