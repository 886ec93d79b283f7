"""The notebook of the documents runs as it is: `python tests/test_notebook.py` runs it and writes its outputs anew."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
import warm

NOTEBOOK = Path(__file__).parent.parent / "docs" / "demo.ipynb"
# What Jupyter does with cells: runs them in one process, and shows the value of the last expression.
RUNNER = """
import ast, contextlib, io, json, sys

names, outputs = {"__name__": "__main__"}, []
for source in json.loads(sys.argv[1]):
    tree, value, said = ast.parse(source), None, io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(said):
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    shown = getattr(value, "_repr_html_", None)
    html = None if shown is None else shown()
    plain = None if value is None else f"<{type(value).__name__}>" if shown else repr(value)
    outputs.append({"said": said.getvalue(), "html": html, "plain": plain})
json.dump(outputs, sys.stdout)
"""


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(notebook: dict, folder: Path) -> list[dict]:
    """Run the cells in order in one fresh process, and give what each shows."""
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    ran = warm.Process([sys.executable, "-c", RUNNER, json.dumps(sources)], cwd=str(folder))
    assert ran.wait() == 0, ran.stderr
    return json.loads(ran.stdout)


def cells_of(html: str) -> list[str]:
    """The labels of the rows of all tables."""
    return re.findall(r'<tr><th style="[^"]*">(.*?)</th>', html)


def told(cell: dict, kind: str) -> str:
    return "".join("".join(output.get("data", {}).get(kind, "")) for output in cell["outputs"])


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_the_notebook_runs_and_shows_the_tables_that_are_stored_in_it(notebook, tmp_path):
    shown = run_cells(notebook, tmp_path)
    cells = code_cells(notebook)
    assert any("<table>" in (one["html"] or "") for one in shown)
    for cell, one in zip(cells, shown, strict=True):
        assert cells_of(told(cell, "text/html")) == cells_of(one["html"] or "")
        assert told(cell, "text/plain") == (one["plain"] or "")
    assert (tmp_path / "repaired" / "dapa_report.json").is_file()


def test_the_notebook_is_one_that_jupyter_opens_and_names_no_machine(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|tmp|root|Users|work)/", text)
    assert all(cell["execution_count"] == number for number, cell in enumerate(code_cells(notebook), 1))
    assert len(text) < 60_000


def write() -> None:
    """Run the notebook, and store what it shows."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        shown = run_cells(content, Path(folder))
    for number, (cell, one) in enumerate(zip(code_cells(content), shown, strict=True), 1):
        outputs = []
        if one["said"]:
            outputs.append({"name": "stdout", "output_type": "stream", "text": one["said"].splitlines(keepends=True)})
        if one["plain"]:
            data = {"text/plain": [one["plain"]]}
            if one["html"]:
                data["text/html"] = one["html"].splitlines(keepends=True)
            outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
        cell |= {"execution_count": number, "outputs": outputs}
    NOTEBOOK.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
