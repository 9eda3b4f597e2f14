"""Execute docs/tutorial.ipynb and write its outputs into it: python docs/make_tutorial.py.

Times, counters and the kernel version are removed, so that a diff shows only real changes.
"""

import tempfile
from pathlib import Path
from typing import Any, Final

import nbformat
from nbclient import NotebookClient

__all__ = ["NOTEBOOK", "executed", "main"]

NOTEBOOK: Final = Path(__file__).resolve().parent / "tutorial.ipynb"


def executed(folder: Path | str) -> Any:
    """Execute the notebook with ``folder`` as the working directory, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised an exception.
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
    """Execute the notebook and write it with its outputs."""
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(folder), NOTEBOOK)


if __name__ == "__main__":
    main()
