"""The notebook of examples/: stripped of outputs, and right when it is run."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples" / "tour.ipynb"


def test_the_notebook_has_no_outputs():
    cells = [cell for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_cells_that_start_no_ranks_run(capsys, monkeypatch):
    monkeypatch.chdir(TOUR.parent)
    cells = {cell["id"]: "".join(cell["source"]) for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]}
    namespace = {}
    for name in ("setup", "show"):
        exec(compile(cells[name], name, "exec"), namespace)
    assert '"sequence_parallel_size": 2' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # The kernel imports this tree, whichever is installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": TOUR.parent}}).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    assert "The longest sequence that fits has" in said and "largest difference of the losses" in said
