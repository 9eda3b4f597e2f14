"""Execute docs/tutorial.ipynb and write its outputs into it: python docs/make_tutorial.py.

Only outputs change. Times, counters and the kernel's version are left out, so that a diff shows what is new.
"""

import tempfile
from pathlib import Path
from typing import Any, Final

import nbformat
from nbclient import NotebookClient

__all__ = ["NOTEBOOK", "executed", "main"]

NOTEBOOK: Final = Path(__file__).resolve().parent / "tutorial.ipynb"


def executed(folder: Path | str) -> Any:
    """Return the notebook as it is after being executed in a folder, which it fills with its files.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message shows where.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=300, record_timing=False, resources=place, kernel_name="python3")
    client.execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    return notebook


def main() -> None:
    """Execute and write the notebook."""
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(folder), NOTEBOOK)


if __name__ == "__main__":
    main()
