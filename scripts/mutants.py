"""The mutants of a Python module: its syntax tree with one node changed."""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
SHOWN = 200  # characters of a change


@dataclass(frozen=True)
class Mutant:
    """One change of a module.

    Attributes:
        index: which of the module's.
        scope: the outermost function that it is in, empty outside of functions.
        lines: of the statement that it is in.
        id: names it whatever else of the module changes.
        digest: of the function or the statement that it is in.
    """

    module: str
    index: int
    scope: str
    line: int
    lines: tuple[int, ...]
    change: str
    id: str
    digest: str


def mutants(path: Path, module: str) -> list[Mutant]:
    """All of a module's, in the order of its text."""
    walk = _Walk(-1)
    walk.visit(ast.parse(path.read_text()))
    seen: Counter[str] = Counter()
    found = []
    for index, (place, line, change) in enumerate(walk.sites):
        name = f"{module} {place.name}: {change}"
        seen[name] += 1
        identity = name if seen[name] == 1 else f"{name} ({seen[name]})"
        found.append(Mutant(module, index, place.scope, line, place.lines, change, identity, place.digest))
    return found


def mutated(path: Path, index: int) -> ast.Module:
    """The module's tree with change number `index` made."""
    tree = _Walk(index).visit(ast.parse(path.read_text()))
    assert isinstance(tree, ast.Module)
    return ast.fix_missing_locations(tree)


@dataclass(frozen=True)
class _Place:
    """Where a walk is: the function, if in one; the name to show; the statement's lines; the digest of the text."""

    scope: str
    name: str
    lines: tuple[int, ...]
    digest: str


class _Walk(ast.NodeTransformer):
    """Visits all that may be changed, and makes change number `target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.sites: list[tuple[_Place, int, str]] = []
        self._classes: list[str] = []
        self._place = _Place("", "-", (), "")

    def _offer(self, node: ast.expr | ast.stmt, other: ast.expr | ast.stmt) -> bool:
        """Notes that `node` can become `other`; whether it shall."""
        change = f"{_text(node)} -> {_text(other)}"
        self.sites.append((self._place, node.lineno, change))
        return len(self.sites) - 1 == self.target

    # --- places ---

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, ast.stmt) or isinstance(node, ast.ClassDef):
            return super().visit(node)
        outer = self._place
        name = outer.name if outer.scope else self._name(node)
        digest = outer.digest if outer.scope else hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:16]
        self._place = _Place(outer.scope, name, _lines(node), digest)
        try:
            return super().visit(node)
        finally:
            self._place = outer

    def _name(self, node: ast.stmt) -> str:
        own = [node.name] if isinstance(node, ast.FunctionDef) else []
        return ".".join([*self._classes, *own]) or "-"

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self._classes.append(node.name)
        node.body = [self.visit(statement) for statement in node.body]
        self._classes.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.defaults = [self.visit(one) for one in node.args.defaults]
        node.args.kw_defaults = [one and self.visit(one) for one in node.args.kw_defaults]
        outer = self._place
        if not outer.scope:
            self._place = dataclasses.replace(outer, scope=outer.name)
        node.body = [self.visit(statement) for statement in node.body]
        self._place = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.value = node.value and self.visit(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return node if ast.unparse(node.func) in ("TypeVar", "cast") else self.generic_visit(node)

    # --- statements left out ---

    def _drop(self, node: ast.stmt) -> ast.AST:
        return ast.Pass() if self._offer(node, ast.Pass()) else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._drop(node)

    def visit_Delete(self, node: ast.Delete) -> ast.AST:
        return self._drop(node)

    def visit_Break(self, node: ast.Break) -> ast.AST:
        return self._drop(node)

    def visit_Continue(self, node: ast.Continue) -> ast.AST:
        return self._drop(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return node if isinstance(node.value, ast.Constant) else self._drop(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """Only what others see; a local name that is missing fails of itself."""
        target = node.targets[0]
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        seen = any(isinstance(part, ast.Attribute | ast.Subscript) for part in parts)
        return self._drop(node) if seen else self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        other = copy.deepcopy(node)
        other.op = _swapped(node.op)
        return other if self._offer(node, other) else self._drop(node)

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is None or (isinstance(node.value, ast.Constant) and node.value.value is None):
            return node
        nothing = ast.Return(ast.Constant(None))
        return nothing if self._offer(node, nothing) else self.generic_visit(node)

    # --- expressions changed ---

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        for number, operator in enumerate(node.ops):
            other = copy.deepcopy(node)
            other.ops[number] = _swapped(operator)
            if self._offer(node, other):
                return other
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        other = copy.deepcopy(node)
        other.op = _swapped(node.op)
        if self._offer(node, other):
            return other
        for number in range(len(node.values)):
            left = [value for place, value in enumerate(node.values) if place != number]
            fewer = left[0] if len(left) == 1 else ast.copy_location(ast.BoolOp(node.op, left), node)
            if self._offer(node, fewer):
                return fewer
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        return self._decide(node)

    def visit_While(self, node: ast.While) -> ast.AST:
        return self._decide(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        return self._decide(node)

    def _decide(self, node: ast.If | ast.While | ast.IfExp) -> ast.AST:
        """What is no comparison, `and`, `or` or `not` (those change by themselves) becomes its contrary."""
        plain = not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant)
        other = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        if plain and self._offer(node.test, other):
            node.test = other
            return node
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Not the unions of types."""
        if isinstance(node.op, ast.BitOr) and isinstance(node.right, ast.Name) and not self._place.scope:
            return node
        other = copy.deepcopy(node)
        other.op = _swapped(node.op)
        return other if self._offer(node, other) else self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        signed = isinstance(node.op, ast.Not | ast.USub)
        return node.operand if signed and self._offer(node, node.operand) else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if value is None or value is ... or isinstance(value, complex):
            return node
        other: Any = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else None
        if isinstance(value, str | bytes):
            other = "XX" + value if isinstance(value, str) else b"XX" + value
        changed = ast.copy_location(ast.Constant(other), node)
        return changed if self._offer(node, changed) else node

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.AST:
        node.value = self.visit(node.value)
        return node


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _swapped(operator: Any) -> Any:
    return SWAPS[type(operator)]()


def _lines(node: ast.stmt) -> tuple[int, ...]:
    """Of the statement itself, without the statements in it."""
    body = getattr(node, "body", None)
    last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
    return tuple(range(node.lineno, last + 1))
