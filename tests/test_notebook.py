"""The notebook of docs/notebooks, cell by cell on CPUs: shell commands as they stand, Python in one namespace."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools import plan

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "tpu_quickstart.ipynb"
DOCUMENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CELLS = [cell for cell in DOCUMENT["cells"] if cell["cell_type"] == "code"]


def text(cell):
    return "".join(cell["source"])


def tags(cell):
    return cell["metadata"].get("tags", [])


def command(line, namespace):
    """Fill in {name} as IPython does; {{ and }} are braces."""
    return line.removeprefix("!").format_map(namespace)


def run_cells(namespace, environment, cwd):
    """Run all cells but the installation; return {source: what it printed}."""
    printed = {}
    for cell in CELLS:
        if "install" in tags(cell):
            continue
        output = io.StringIO()
        python = []
        for line in text(cell).splitlines():
            if line.startswith("!"):
                done = subprocess.run(
                    ["bash", "-c", command(line, namespace)],
                    cwd=cwd,
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                output.write(done.stdout)
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            else:
                assert not line.startswith("%"), f"only the installation may use magics: {line}"
                python.append(line)
        with contextlib.redirect_stdout(output), contextlib.chdir(cwd):
            exec(compile("\n".join(python), str(NOTEBOOK), "exec"), namespace)
        if "settings" in tags(cell):
            small = "--config.evaluation.prompts=64 --config.evaluation.reference_samples=1"
            namespace.update(STEPS=2, RUN="runs/small", MORE=small)
        printed[text(cell)] = output.getvalue()
    return printed


@pytest.mark.slow
def test_cells_run_in_order_on_cpus(tmp_path, monkeypatch):
    shown = []
    display = ModuleType("IPython.display")
    display.HTML = shown.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(NOTEBOOK.parents[2]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    printed = run_cells({}, environment, tmp_path)
    outputs = list(printed.values())
    assert outputs[1] == "8 x cpu\n"
    assert "fits: " in outputs[2] and "fits: " in outputs[3]
    result = json.loads(outputs[4].splitlines()[-1])
    assert result["steps"] == 2 and (tmp_path / result["export"] / "model.safetensors").is_file()
    assert f"win_rate                 {result['win_rate']:.4g}" in outputs[5]
    assert re.search(r"time/update +[\d.]+ s", outputs[5]) and "compilations_during_run  0" in outputs[5]
    assert "<html" in shown[0]
    assert outputs[-1].strip()  # an answer


def test_notebook_is_stored_without_outputs_and_names_no_other_magic():
    assert DOCUMENT["nbformat"] == 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
    assert [tags(cell) for cell in CELLS if tags(cell)] == [["install"], ["settings"]]
    assert [text(cell) for cell in CELLS if "%" in text(cell)[:1]] == ['%pip install --quiet "xpo_jax[tpu]"']
    assert not any("import jax" in text(cell) and not text(cell).startswith("!") for cell in CELLS)


def test_plans_of_the_notebook_fit(capsys):
    """For the devices that the notebook assumes."""
    planned = [text(cell) for cell in CELLS if "tools.plan" in text(cell)]
    assert len(planned) == 2
    for line in planned:
        argv = command(line, {"DEVICES": 8}).split()[3:]
        assert plan.main(argv) == 0 and "fits: " in capsys.readouterr().out
