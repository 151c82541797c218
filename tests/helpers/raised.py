"""Finds the texts of all errors that the code can raise."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEPTH = 4  # of functions that call each other to make a text
HOLE = "\0"  # stands for a value in a text

Function = ast.FunctionDef | ast.AsyncFunctionDef
Values = dict[str, list[ast.expr]]  # by name


class Text(NamedTuple):
    """A text of a message, as its constant parts between the values that are put in, and where the error is raised."""

    parts: tuple[str, ...]
    place: str

    def is_in(self, page: str) -> bool:
        """Returns whether the parts are there one after the other, with any values between them."""
        place = 0
        for part in self.parts:
            place = page.find(part, place)
            if place < 0:
                return False
            place += len(part)
        return True


def raised_texts(paths: list[Path], root: Path) -> Iterator[Text]:
    """Yields the texts of the messages of all `raise` and `sys.exit`, and of what is printed after `error: `.

    A message may be made by functions of the project and by variables: their texts count as well. Texts of one word or of fewer
    than 12 characters are left out.
    """
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in paths}
    modules = {names[path]: ast.parse(path.read_text()) for path in paths}
    finder = _Finder(modules)
    for path, name in names.items():
        for statement, inside in _statements(modules[name], None):
            values = _assigned(inside) if inside else {}
            for parts in finder.texts(statement, name, values, DEPTH):
                constant = "".join(parts).strip()
                if len(constant) >= 12 and " " in constant:
                    yield Text(parts, f"{path.relative_to(root)}:{statement.lineno}")


def _statements(node: ast.AST, inside: Function | None) -> Iterator[tuple[ast.expr, Function | None]]:
    """Yields the expressions that are raised, or printed as errors, and the function around each."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield child.exc, inside
        elif isinstance(child, ast.Call):
            called = ast.unparse(child.func)
            if called == "sys.exit" or (called == "print" and "error: " in ast.unparse(child)):
                yield child, inside
        yield from _statements(child, child if isinstance(child, Function) else inside)


def _assigned(node: ast.AST) -> Values:
    """Returns all values that each name gets in a function, or at the top of a module."""
    found: Values = {}
    for child in node.body if isinstance(node, ast.Module) else ast.walk(node):
        targets, value = list[ast.expr](), None
        if isinstance(child, ast.Assign):
            targets, value = child.targets, child.value
        elif isinstance(child, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            targets, value = [child.target], child.value
        elif isinstance(child, ast.For | ast.comprehension):
            targets, value = [child.target], child.iter
        for name in (name for target in targets for name in ast.walk(target)):
            if isinstance(name, ast.Name) and value is not None:
                found.setdefault(name.id, []).append(value)
    return found


def _only_compares(node: ast.AST) -> bool:
    """Returns whether the constants within an expression are compared with a text, and no part of it."""
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return isinstance(node, ast.Compare) or called.startswith("re.") or called.endswith((".startswith", ".endswith"))


class _Finder:
    """Finds the texts in expressions, also in the functions and the names that they use.

    Args:
        modules: The code by the names of its modules.
    """

    def __init__(self, modules: dict[str, ast.Module]) -> None:
        self._functions: dict[str, list[tuple[Function, str]]] = {}
        self._constants = {module: _assigned(tree) for module, tree in modules.items()}
        self._imports: dict[str, dict[str, str]] = {}
        self._methods = set[ast.stmt]()
        for module, tree in modules.items():
            nodes = [*ast.walk(tree)]
            self._methods.update(child for node in nodes if isinstance(node, ast.ClassDef) for child in node.body)
            for function in (node for node in nodes if isinstance(node, Function)):
                self._functions.setdefault(function.name, []).append((function, module))
            imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
            self._imports[module] = {alias.name: node.module or "" for node in imports for alias in node.names}

    def texts(self, node: ast.AST, module: str, values: Values, depth: int) -> Iterator[tuple[str, ...]]:
        """Yields the texts that an expression of a module uses. `values` has those of the names around it."""
        children = [] if _only_compares(node) else [*ast.iter_child_nodes(node)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield (node.value,)
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
            yield tuple("".join(parts).split(HOLE))
            children = [part for part in children if not isinstance(part, ast.Constant)]
        if depth > 0 and isinstance(node, ast.Name):
            constants = self._constants[module]
            there = self._constants.get(self._imports[module].get(node.id, ""), {})
            for value in values.get(node.id) or constants.get(node.id) or there.get(node.id, []):
                yield from self.texts(value, module, values, depth - 1)
        if depth > 0 and isinstance(node, ast.Call):
            for function, home in self._called(node.func, module):
                inner = _assigned(function)
                for child in ast.walk(function):
                    if isinstance(child, ast.Return | ast.Yield) and child.value is not None:
                        yield from self.texts(child.value, home, inner, depth - 1)
        for child in children:
            yield from self.texts(child, module, values, depth)

    def _called(self, called: ast.expr, module: str) -> list[tuple[Function, str]]:
        """Returns the functions that a call in a module may mean: those in it, the one it imports, or the only one."""
        name, is_method = ast.unparse(called).rpartition(".")[2], isinstance(called, ast.Attribute)
        found = [each for each in self._functions.get(name, []) if (each[0] in self._methods) == is_method]
        near = [each for each in found if each[1] in (module, self._imports[module].get(name))]
        return near or (found if len(found) == 1 else [])
