"""What a network's code says: decisions on the number of rows, and on its mode.

Only classes outside torch are read, from `forward` on through the methods it calls on itself. A class whose source is
not at hand (typed into a console, compiled) is passed over.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

from export.audit.facts import Branch


def batch_size_branches(module: nn.Module) -> Iterator[Branch]:
    """Every `if` whose test compares a number of rows with something else, once for each class.

    Held against another number of rows, or followed by nothing but `raise`, it is a check and no branch.
    """
    seen: set[type[nn.Module]] = set()
    for path, part in module.named_modules():
        if type(part) not in seen:
            seen.add(type(part))
            for where, code in _branches(type(part)):
                yield Branch(layer=path, where=where, code=code)


def reads_its_mode(part: nn.Module) -> bool:
    """Whether the code of a layer outside torch asks for `self.training`."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == "training" and _is_self(node.value)
        for function in _functions(type(part)).values()
        for node in ast.walk(function)
    )


def _functions(kind: type[nn.Module]) -> dict[str, ast.FunctionDef]:
    """`forward`, and the methods that it calls on itself, by name."""
    found: dict[str, ast.FunctionDef] = {}
    wanted = ["forward"]
    while wanted:
        name = wanted.pop()
        function = None if name in found else _parsed(kind, name)
        if function is not None:
            found[name] = function
            wanted.extend(
                node.func.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value)
            )
    return found


def _parsed(kind: type[nn.Module], name: str) -> ast.FunctionDef | None:
    method = inspect.unwrap(getattr(kind, name, None) or len)
    if not inspect.isfunction(method) or (method.__module__ or "").partition(".")[0] == "torch":
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _branches(kind: type[nn.Module]) -> tuple[tuple[str, str], ...]:
    found = []
    for name, function in _functions(kind).items():
        rows = _row_names(function)
        tensors = {argument.arg for argument in function.args.args[1:] if not _is_collection(argument.annotation)}
        for node in ast.walk(function):
            if not isinstance(node, ast.If | ast.IfExp) or _only_raises(node):
                continue
            if _decides_on_rows(node.test, rows, tensors):
                found.append((f"{kind.__name__}.{name}, line {node.lineno}", ast.unparse(node.test)))
    return tuple(found)


def _is_collection(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(
        word in ast.unparse(annotation).lower() for word in ("list", "sequence", "tuple", "dict", "mapping", "iterable")
    )


def _only_raises(node: ast.If | ast.IfExp) -> bool:
    return isinstance(node, ast.If) and not node.orelse and all(isinstance(inside, ast.Raise) for inside in node.body)


def _row_names(function: ast.FunctionDef) -> set[str]:
    """Names that hold a number of rows: `rows = x.shape[0]`, `rows, _ = x.shape`."""
    found: set[str] = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and _is_rows(node.value, set(), set()):
                found.add(target.id)
            elif isinstance(target, ast.Tuple | ast.List) and target.elts and isinstance(target.elts[0], ast.Name):
                first_of_pairs = isinstance(node.value, ast.Tuple) and _is_rows(node.value.elts[0], set(), set())
                if _is_shape(node.value) or first_of_pairs:
                    found.add(target.elts[0].id)
    return found


def _is_shape(node: ast.expr) -> bool:
    """`x.shape` or `x.size()`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "size" and not node.args + node.keywords
    return isinstance(node, ast.Attribute) and node.attr == "shape"


def _is_rows(node: ast.AST, rows: set[str], tensors: set[str]) -> bool:
    """`x.shape[0]`, `x.size(0)`, `x.size()[0]`, `len(x)` of an argument, or a name for one of them."""
    match node:
        case ast.Name(id=name):
            return name in rows
        case ast.Subscript(value=value, slice=ast.Constant(value=0)):
            return _is_shape(value) and not _is_weight(value)
        case ast.Call(func=ast.Attribute(attr="size") as function, args=[ast.Constant(value=0)]):
            return not _is_weight(function)
        case ast.Call(func=ast.Name(id="len"), args=[ast.Name(id=name)]):
            return name in tensors
        case _:
            return False


def _is_weight(node: ast.AST) -> bool:
    """`self.weight.shape`: a number of rows in name only."""
    return any(isinstance(inside, ast.Name) and inside.id == "self" for inside in ast.walk(node))


def _decides_on_rows(test: ast.expr, rows: set[str], tensors: set[str]) -> bool:
    def mentions(node: ast.AST) -> bool:
        return any(_is_rows(inside, rows, tensors) for inside in ast.walk(node))

    if isinstance(test, ast.BoolOp):
        return any(_decides_on_rows(value, rows, tensors) for value in test.values)
    if isinstance(test, ast.UnaryOp):
        return _decides_on_rows(test.operand, rows, tensors)
    if isinstance(test, ast.Compare):
        sides = [mentions(side) for side in (test.left, *test.comparators)]
        return any(sides) and not all(sides)
    return mentions(test)
