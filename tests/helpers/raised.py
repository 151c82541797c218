"""Finds the texts of all errors that the code can raise."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEPTH = 4  # of functions that call each other to make a text


class Text(NamedTuple):
    """A constant part of a message, and where the error is raised."""

    text: str
    place: str


def raised_texts(paths: list[Path], root: Path) -> Iterator[Text]:
    """Yields the constant parts of the messages of all `raise` statements, and of what is printed after `error: `.

    A message may be made by functions of the project and by variables: their constants count as well. Parts of one word or of
    fewer than 12 characters are left out.
    """
    modules = {path: ast.parse(path.read_text()) for path in paths}
    functions: dict[str, list[ast.FunctionDef]] = {}
    for module in modules.values():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef):
                functions.setdefault(node.name, []).append(node)
    own = {".".join(path.relative_to(root).with_suffix("").parts): dict(_assigned(module)) for path, module in modules.items()}
    for path, module in modules.items():
        constants = _imported(module, own) | dict(_assigned(module))
        for statement, inside in _statements(module, None):
            values = dict(_assigned(inside)) if inside else {}
            for text in _texts(statement, functions, constants, values, DEPTH):
                if len(text.strip()) >= 12 and " " in text.strip():
                    yield Text(text, f"{path.relative_to(root)}:{statement.lineno}")


def _statements(node: ast.AST, inside: ast.FunctionDef | None) -> Iterator[tuple[ast.expr, ast.FunctionDef | None]]:
    """Yields the expressions that are raised, or printed as errors, and the function around each."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield child.exc, inside
        elif isinstance(child, ast.Call) and ast.unparse(child.func) == "print" and "error: " in ast.unparse(child):
            yield child, inside
        yield from _statements(child, child if isinstance(child, ast.FunctionDef) else inside)


def _imported(module: ast.Module, own: dict[str, dict[str, ast.expr]]) -> dict[str, ast.expr]:
    """Returns the constants that a module imports. `own` has those of each module."""
    imports = [node for node in ast.walk(module) if isinstance(node, ast.ImportFrom)]
    names = [(alias.name, own.get(node.module or "", {})) for node in imports for alias in node.names]
    return {name: there[name] for name, there in names if name in there}


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for child in node.body if isinstance(node, ast.Module) else ast.walk(node):
        if isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
            yield child.targets[0].id, child.value
        elif isinstance(child, ast.NamedExpr):
            yield child.target.id, child.value


def _texts(
    node: ast.AST,
    functions: dict[str, list[ast.FunctionDef]],
    constants: dict[str, ast.expr],
    values: dict[str, ast.expr],
    depth: int,
) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    if depth > 0 and isinstance(node, ast.Name) and (value := values.get(node.id) or constants.get(node.id)):
        yield from _texts(value, functions, constants, values, depth - 1)
    if depth > 0 and isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        found = functions.get(name, [])
        for function in found if len(found) == 1 else []:
            inner = dict(_assigned(function))
            for child in ast.walk(function):
                if isinstance(child, ast.Return) and child.value is not None:
                    yield from _texts(child.value, functions, constants, inner, depth - 1)
    for child in ast.iter_child_nodes(node):
        yield from _texts(child, functions, constants, values, depth)
