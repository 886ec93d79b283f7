"""The wording of every error and every step, in one file: `python tests/test_messages.py` writes it anew."""

import ast
from collections.abc import Iterator
from pathlib import Path

import dapa_merge
from dapa_merge import errors

SNAPSHOT = Path(__file__).with_name("messages.txt")
PACKAGE = Path(dapa_merge.__file__).parent
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)}
LEVELS = {"info", "warning"}


def template(node: ast.expr) -> str | None:
    """The text of an expression, with expressions of an f-string in braces; None if it is not a text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
            if isinstance(part, (ast.Constant, ast.FormattedValue))
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None or right is None else left + right
    return None


def says(call: ast.Call) -> bool:
    called = call.func
    if isinstance(called, ast.Name):
        return called.id in ERRORS
    return isinstance(called, ast.Attribute) and called.attr in LEVELS and ast.unparse(called.value) == "LOG"


def messages() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args and says(node))
        found = [text for call in calls if (text := template(call.args[0])) is not None]
        if found:
            yield f"[{path.relative_to(PACKAGE).as_posix()}]"
            yield from sorted({text.replace("\n", "\\n") for text in found})
            yield ""


def test_every_message_reads_as_in_the_snapshot():
    assert list(messages()) == SNAPSHOT.read_text(encoding="utf-8").split("\n")[:-1]


if __name__ == "__main__":
    SNAPSHOT.write_text("".join(f"{line}\n" for line in messages()), encoding="utf-8")
