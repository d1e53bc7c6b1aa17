"""The notebook goes from nothing to the picture."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's machinery
def test_quickstart_runs_and_shows_the_picture(tmp_path):
    notebook = nbformat.read(QUICKSTART, as_version=4)
    for cell in notebook.cells:  # less training will do for the picture
        source = cell.source.replace("max_epochs=10", "max_epochs=2")
        cell.source = source.replace("images[:-700], targets[:-700]", "images[:650], targets[:650]")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    by_source = {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    (pictures,) = (outputs for source, outputs in by_source.items() if "plot_clusters(labels" in source)
    assert "image/png" in pictures[-1].data
    said = [out.text for outputs in by_source.values() for out in outputs if out.output_type == "stream"]
    assert not any("lightning_dropcluster" in text and "Warning" in text for text in said)
