"""The README's examples run as they stand, one after the other."""

import re
from pathlib import Path

import matplotlib.pyplot as plt

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(examples) == 10
    names = {}
    for example in examples: exec(compile(example, "README.md", "exec"), names)
    assert names["run"].n_iter == 599               # of the fit under observation
    assert len(names["steps"]) == 69                # the first ten and one in ten
    assert len(names["means"]) == 599       # 1,197 images in batches of 2
    assert names["study"].missing() == 0
    assert set(names["study"].frame().status) == {"ok"}
    assert "valid_accuracy" in capsys.readouterr().out
    plt.close("all")
    printed, = re.findall(r"^```text\n(.*?)\n^```", README, re.MULTILINE | re.DOTALL)
    assert str(names["report"]) == printed
