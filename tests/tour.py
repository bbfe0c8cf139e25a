"""`python -m tests.tour`: runs examples/tour.ipynb on SmolLM2, and stores in it what its cells print. Some minutes."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"


def executed(timeout_s: int) -> nbformat.NotebookNode:
    """The notebook after a run in a process of its own, in its folder. Progress bars and warnings are left out.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": NOTEBOOK.parent}}
    options = {"kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, timeout=timeout_s, resources=where, **options).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(timeout_s=3600), NOTEBOOK)
