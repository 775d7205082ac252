"""The notebook in docs/examples runs from its first cell to its last."""

import json
import tempfile

import numpy as np
from PIL import Image

from conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "examples" / "plan.ipynb"
CODE = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs_and_draws_its_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict = {}
    for number, source in enumerate(CODE):
        exec(compile(source, f"cell {number} of plan.ipynb", "exec"), names)
    picture = np.asarray(Image.open(names["folder"] / "position.png").convert("RGB"))
    assert picture.shape[1] > 1000 and picture.std() > 30
    printed = capsys.readouterr().out
    assert names["plan"].explain(names["position"]) in printed and "CutMix" in printed
    assert printed.count("labels [") == 3
    assert names["summary"]["step"] == 4 and names["model"].classes == ["china", "flower"]


def test_the_notebook_holds_no_outputs_and_no_paths_of_a_machine():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert "/home/" not in str(cell["source"]) and "/work" not in str(cell["source"])
