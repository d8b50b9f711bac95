"""Committed records: the README's tables come from them, and each says of itself what the present code says of it."""

import importlib
import re
from pathlib import Path

import pytest

from experiments import EXPERIMENTS, table
from experiments.__main__ import main
from experiments.errors import InputError
from experiments.results import read_summary

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# mark in the README: its records, where they are more than one or go by another name
SEVERAL = {"more-seeds": ["running_seeds_0_to_5", "running_seeds_6_to_11"]}
WHOLE = {"MNIST": 50_000, "Fashion-MNIST": 50_000, "breast cancer": 455}


@pytest.mark.parametrize("name", re.findall(r"^<!-- results: (.*) -->$", README, re.MULTILINE))
def test_readme_tables_are_generated_from_the_committed_records(name):
    files = [f"experiments/results/{f}.json" for f in SEVERAL.get(name, [name.replace("-", "_")])]
    records = [read_summary(ROOT / f) for f in files]
    assert table.insert(README, table.markdown(records), name) == README, (
        f"run: python -m experiments table {' '.join(files)} --into README.md --name {name}")
    for r in records: assert r.get("machine") or (r["complete"] and r["train_images"] == WHOLE[r["data"]])


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n != "small-batch"])
def test_the_verdict_in_a_record_is_the_present_criterion_s(name):
    record = read_summary(ROOT / "experiments" / "results" / f"{name.replace('-', '_')}.json")
    module = importlib.import_module(EXPERIMENTS[name][0])
    assert (record["experiment"], record["complete"], record["train_images"]) == (name, True, WHOLE[record["data"]])
    assert (record["reproduced"], record["verdict"]) == module.judge(record["rows"], record["data"],
                                                                     record["train_images"])


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
