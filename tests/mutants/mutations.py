"""Makes mutants of a module: its syntax tree with one small fault in it, of the kinds that people make."""

import ast
import copy
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs

_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATE: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
#: What only people read, or only the type checker: a fault there is none of behaviour.
_UNHEARD = ("log", "warnings", "TypeVar", "Literal", "cast", "ProtocolError", "EncodeError", "StoreError", "ValueError")


@attrs.frozen
class Mutant:
    """One fault: the `number`-th of its module."""

    path: Path
    number: int
    line: int
    #: Function or method, with its class, in whose body it is; "" outside, where only an import runs it.
    owner: str
    #: The lines of the statement: a test that runs none of them cannot notice it.
    lines: range
    before: str
    after: str
    #: Which one it is, if there are several such changes in the body.
    which: int = 1

    @property
    def name(self) -> str:
        """The change, for people."""
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after}"

    @property
    def change(self) -> str:
        """A name that outlives changes of other lines."""
        which = f" #{self.which}" if self.which > 1 else ""
        return f"{self.path} {self.owner or '-'}: {self.before}  ->  {self.after}{which}"


def _edits(node: ast.AST) -> Iterator[ast.AST | None]:
    """Everything that may stand in the place of `node`; None: the statement is left out."""
    new: ast.AST
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in _COMPARE:
            new = copy.deepcopy(node)
            new.ops[0] = _COMPARE[type(op)]()
            yield new
        case ast.BoolOp(op=op):
            new = copy.deepcopy(node)
            new.op = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield new
            for left_out in range(len(node.values)):  # a guard that was forgotten
                left = node.values[:left_out] + node.values[left_out + 1 :]
                yield ast.BoolOp(op, left) if len(left) > 1 else left[0]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.BinOp(op=op) if type(op) in _OPERATE:
            new = copy.deepcopy(node)
            new.op = _OPERATE[type(op)]()
            yield new
        case ast.AugAssign(op=op) if type(op) in _OPERATE:
            new = copy.deepcopy(node)
            new.op = _OPERATE[type(op)]()
            yield new
            yield None
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Name(id=name, ctx=ast.Load()) if name in _NAMES:
            yield ast.Name(_NAMES[name], ast.Load())
        case ast.Expr(value=ast.Call() | ast.Await()):
            yield None
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Delete():
            yield None
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.If() | ast.While():
            for outcome in (True, False)[isinstance(node, ast.While) :]:
                new = copy.copy(node)
                new.test = ast.Constant(outcome)
                yield new
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))


def _is_unheard(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    called = node.value if isinstance(node, ast.Expr) else node
    if isinstance(called, ast.Call):
        name: ast.expr = called.func
        while isinstance(name, ast.Attribute):
            name = name.value
        return isinstance(name, ast.Name) and name.id in _UNHEARD
    return isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__")


#: Fields of a node that hold types.
_TYPES = ("annotation", "returns", "decorator_list", "bases")


@attrs.frozen
class _Place:
    """A node that is behaviour, and where it is."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    owner: str
    lines: range


def _lines_of(statement: ast.stmt) -> range:
    """Without those of the statements in it."""
    inner = getattr(statement, "body", None)
    end = inner[0].lineno - 1 if inner else statement.end_lineno or statement.lineno
    return range(statement.lineno, max(statement.lineno, end) + 1)


def _places(node: ast.AST, scope: str = "", owner: str = "", lines: range = range(0)) -> Iterator[_Place]:
    """Every place below `node`, which is in the body of the function `owner`; `scope`: names of classes before it."""
    for field, value in ast.iter_fields(node):
        if field in _TYPES:
            continue
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _is_unheard(child):
                continue
            in_body = owner
            if not owner and field == "body" and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                in_body = f"{scope}{node.name}"
            within = _lines_of(child) if isinstance(child, ast.stmt) else lines
            yield _Place(node, field, index, child, in_body, within)
            yield from _places(
                child, f"{scope}{child.name}." if isinstance(child, ast.ClassDef) else scope, in_body, within
            )


def _changes(tree: ast.Module) -> Iterator[tuple[_Place, ast.AST | None]]:
    for place in _places(tree):
        for edit in _edits(place.node):
            yield place, edit


def _told(node: ast.AST) -> str:
    if isinstance(node, ast.If | ast.While):
        node = type(node)(node.test, [ast.Pass()], [])
    head = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split("\n")[0]
    return head if len(head) <= 90 else f"{head[:87]}..."


@functools.cache
def _source(path: Path) -> str:
    return path.read_text()  # once: whoever edits it meanwhile does not change what is tried


@functools.cache
def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a module."""
    found, same = list[Mutant](), Counter[tuple[str, str, str]]()
    for number, (place, edit) in enumerate(_changes(ast.parse(_source(path)))):
        before, after = _told(place.node), "(left out)" if edit is None else _told(edit)
        same[key := (place.owner, before, after)] += 1
        line = getattr(place.node, "lineno", 0)
        found.append(Mutant(path, number, line, place.owner, place.lines, before, after, same[key]))
    return found


def mutated(path: Path, number: int) -> ast.Module:
    """The module's tree with the `number`-th fault in it."""
    tree = ast.parse(_source(path))
    for at, (place, edit) in enumerate(_changes(tree)):
        if at == number:
            new = ast.copy_location(ast.Pass() if edit is None else edit, place.node)
            if place.index is None:
                setattr(place.parent, place.field, new)
            else:
                getattr(place.parent, place.field)[place.index] = new
            return ast.fix_missing_locations(tree)
    raise IndexError(number)
