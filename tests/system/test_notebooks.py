"""The notebooks: stored without outputs, and every cell of them runs on tiny plates, with runs and a table that real commands made."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests import forked, runs

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("01_plates.ipynb", "02_training.ipynb", "03_mechanisms.ipynb")


def parameters(notebook: NotebookNode) -> int:
    """Return the place of the cell that holds the notebook's parameters."""
    (place,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return place


def execute(name: str, folder: Path, **values: object) -> list[str]:
    """Run a notebook in `folder` with its parameters set to `values`; return the pictures that it showed, as HTML."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    place = parameters(notebook)
    source = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    assert all(f"{key} = " in notebook.cells[place].source for key in values), "a parameter is set that the notebook has not"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"from pathlib import *\n{source}"))
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=runs.environment() | {"IPYTHONDIR": str(folder / ".ipython"), "OMP_NUM_THREADS": "1"})
    shown = [output.get("data", {}).get("text/html", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    return [html for html in shown if "<img" in html]


def test_the_notebooks_are_these():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stored_without_outputs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert parameters(notebook) < 3, "what to change stands at the beginning"


def test_every_cell_runs_on_tiny_plates(tiny_plates, trained, table, tmp_path):
    plates = tmp_path / "plates"
    shutil.copytree(tiny_plates, plates)  # measurements are kept beside the plates
    other = tmp_path / "other"
    forked.train(tiny_plates, other, "distributed.ranks=1", "kernels=native", "training.max_steps=2", "seed=1")
    assert len(execute(NAMES[0], tmp_path, PLATES=str(plates), PIXEL_SIZE_UM=0.65)) == 7
    pictures = execute(NAMES[1], tmp_path, RUNS=[trained, other])
    assert len(pictures) == 6, "comparison, loss, accuracy, recall, confusion, speed"
    pictures = execute(NAMES[2], tmp_path, PLATES=str(plates), TABLE=table, DRAWS=200)
    for words in (
        "placed by PCA",
        "nearest treatments by cosine",
        "concentration's median".replace("'", "&#x27;"),
        "the whole field",
        "(Grad-CAM",
    ):
        assert any(words in picture for picture in pictures), f"no picture's reading says {words!r}"
