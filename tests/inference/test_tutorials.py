"""The tutorials run, print a verdict and leave their files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "tutorials"


@pytest.mark.parametrize("backend", ["numpyro", "pyro"])
def test_eight_schools(backend, tmp_path):
    pytest.importorskip(backend)
    path = [str(TUTORIALS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    out = subprocess.run(
        [sys.executable, str(TUTORIALS / "eight_schools.py"), "--backend", backend, "--num-steps", "500"],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "theta[7]" in out.stdout and "Good: use the draws as they are (Pareto k 0." in out.stdout
    assert "Warning" not in out.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        f"eight_schools_{backend}.png", f"eight_schools_{backend}.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["numpyro", "pyro"])
def test_notebooks_are_executed_and_name_no_path(backend):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(TUTORIALS / f"eight_schools_{backend}.ipynb", 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert any("Pareto k" in output.get("text", "") for cell in code for output in cell.outputs)
