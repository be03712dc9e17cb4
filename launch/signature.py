"""What a `_target_` accepts, read from its source's syntax tree: nothing is imported, so a check loads no torch.

A class gives the arguments of its `__init__` or its dataclass fields, a function its arguments.
"""

import ast
import importlib.util
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

ROOT = Path(__file__).resolve().parent.parent
PLAIN = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple, "dict": dict, "Path": str}
SAME_AS = {"Sequence": "list", "Iterable": "list", "List": "list", "Mapping": "dict", "Dict": "dict", "Tuple": "tuple"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class UnknownTarget(LookupError):
    """No such class or function; the message says how far the path leads, `names` what stands there."""

    def __init__(self, problem: str, names: list[str]):
        super().__init__(problem)
        self.names = names


@dataclass(frozen=True)
class Parameter:
    hint: Any
    required: bool
    """Without a default and of a type that YAML can give; other arguments are the builder's to hand over."""


@dataclass(frozen=True)
class Signature:
    parameters: dict[str, Parameter]
    open: bool
    """Takes **kwargs: unknown keys can't be told."""


@cache
def read(target: str) -> Signature:
    """The signature of a dotted path; raises UnknownTarget."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if _file(module) is not None:
            return _resolve(module, parts[cut:])
    raise UnknownTarget(f"no module {parts[0]}", [])


def _resolve(module: str, names: list[str]) -> Signature:
    home, item = _find(module, names[0])
    if item is None:
        raise UnknownTarget(f"{module} has no {names[0]}", sorted(_defined(module)))
    for name in names[1:]:
        body = getattr(item, "body", [])
        members = {inner.name: inner for inner in body if isinstance(inner, Function | ast.ClassDef)}
        if name not in members:
            raise UnknownTarget(f"{module}.{names[0]} has no {name}", sorted(members))
        static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in members[name].decorator_list)
        item = members[name]
        if isinstance(item, Function):
            return _arguments(home, item, skip=0 if static else 1)
    return _class(home, item) if isinstance(item, ast.ClassDef) else _arguments(home, item)


def _class(module: str, item: ast.ClassDef) -> Signature:
    for inner in item.body:
        if isinstance(inner, Function) and inner.name == "__init__":
            return _arguments(module, inner, skip=1)
    found = [_find(module, base.id) for base in _names(item.bases)]
    bases = [_class(home, base) for home, base in found if isinstance(base, ast.ClassDef)]
    inherited = {name: parameter for base in reversed(bases) for name, parameter in base.parameters.items()}
    if not _holds_fields(item):
        return Signature(inherited, open=any(base.open for base in bases))
    own = {}
    for inner in item.body:
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            options = {o.arg: o.value for o in inner.value.keywords} if isinstance(inner.value, ast.Call) else {}
            made = isinstance(inner.value, ast.Call) and _last(inner.value.func) == "field"
            fixed = made and isinstance(options.get("init"), ast.Constant) and options["init"].value is False
            if fixed or _last(inner.annotation) in ("ClassVar", "KW_ONLY"):
                continue
            default = bool({"default", "default_factory"} & set(options)) if made else inner.value is not None
            own[inner.target.id] = _parameter(module, inner.annotation, default)
    return Signature(inherited | own, open=False)


def _holds_fields(item: ast.ClassDef) -> bool:
    marks = [mark.func if isinstance(mark, ast.Call) else mark for mark in item.decorator_list]
    return "dataclass" in map(_last, marks) or "NamedTuple" in map(_last, item.bases)


def _arguments(module: str, item: Function, skip: int = 0) -> Signature:
    given = item.args
    plain = given.posonlyargs + given.args
    defaults = [False] * (len(plain) - len(given.defaults)) + [True] * len(given.defaults)
    pairs = list(zip(plain, defaults, strict=True))[skip:]
    keywords = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    pairs += [(argument, default is not None) for argument, default in keywords]
    found = {argument.arg: _parameter(module, argument.annotation, default) for argument, default in pairs}
    return Signature(found, open=given.kwarg is not None)


def _parameter(module: str, annotation: ast.expr | None, default: bool) -> Parameter:
    hint, from_yaml = _hint(module, annotation)
    return Parameter(hint, required=from_yaml and not default)


def _hint(module: str, item: ast.expr | None) -> tuple[Any, bool]:
    """The annotated type, and whether YAML alone can give it. What can't be told is Any."""
    if isinstance(item, ast.Constant):
        return _hint(module, ast.parse(item.value, mode="eval").body) if isinstance(item.value, str) else (None, False)
    if isinstance(item, ast.BinOp):
        (left, one), (right, other) = _hint(module, item.left), _hint(module, item.right)
        return Union[left, right], one or other  # noqa: UP007 (either may be None)
    if isinstance(item, ast.Subscript):
        return _subscript(module, SAME_AS.get(_last(item), _last(item)), item.slice)
    name = SAME_AS.get(_last(item), _last(item))
    if name in PLAIN:
        return PLAIN[name], True
    home, found = _find(module, name) if isinstance(item, ast.Name) else (module, None)
    if isinstance(found, ast.ClassDef):
        return types.new_class(found.name), False
    return _hint(home, found) if isinstance(found, ast.expr) else (Any, False)


def _subscript(module: str, name: str, inside: ast.expr) -> tuple[Any, bool]:
    items = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    if name == "Literal":
        return Literal[tuple(ast.literal_eval(item) for item in items)], True
    if name not in ("Union", "Optional", "Annotated", "list", "tuple", "dict"):
        return Any, False
    dots = [isinstance(item, ast.Constant) and item.value is Ellipsis for item in items]
    hints = [(..., True) if dot else _hint(module, item) for item, dot in zip(items, dots, strict=True)]
    args, from_yaml = tuple(hint for hint, _ in hints), any(plain for _, plain in hints)
    if name == "Annotated":
        return hints[0]
    if name in ("Union", "Optional"):
        return Union[args + ((None,) if name == "Optional" else ())], from_yaml  # noqa: UP007, F821
    return types.GenericAlias(PLAIN[name], args), all(plain for _, plain in hints)


def _find(module: str, name: str) -> tuple[str, ast.AST | None]:
    """The class, function or assigned expression of that name, and the module that defines it; imports are followed."""
    found = _defined(module).get(name)
    if isinstance(found, ast.ImportFrom):
        source = found.module or ""
        if found.level:
            package = module.split(".") if _file(module).name == "__init__.py" else module.split(".")[:-1]
            source = ".".join(package[: len(package) - found.level + 1] + ([source] if source else []))
        real = next(alias.name for alias in found.names if (alias.asname or alias.name) == name)
        top = source.split(".")[0]  # other packages' names stay unread: parsing torch would take longer than the run
        near = top == module.split(".")[0] or (ROOT / top).is_dir()
        return _find(source, real) if near and _file(source) else (module, None)
    if isinstance(found, ast.Name) and found.id != name:
        return _find(module, found.id) if found.id in _defined(module) else (module, found)
    return module, found


@cache
def _defined(module: str) -> dict[str, ast.AST]:
    """What a module defines or imports by name at its top level."""
    found: dict[str, ast.AST] = {}
    for item in _statements(ast.parse(_file(module).read_text(encoding="utf-8")).body):
        if isinstance(item, Function | ast.ClassDef):
            found[item.name] = item
        elif isinstance(item, ast.ImportFrom):
            found |= {alias.asname or alias.name: item for alias in item.names}
        elif isinstance(item, ast.Assign | ast.AnnAssign) and item.value is not None:
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            found |= {target.id: item.value for target in _names(targets)}
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for item in body:
        if isinstance(item, ast.If | ast.Try):
            yield from _statements(item.body + item.orelse)
        else:
            yield item


@cache
def _file(module: str) -> Path | None:
    """The source of a module, found by path: only the import of a parent package could run code, and none happens."""
    top, *rest = module.split(".")
    if (ROOT / top).is_dir():
        places = [ROOT / top]
    else:
        spec = importlib.util.find_spec(top) if top else None
        places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
        if spec and not places and spec.origin and spec.origin.endswith(".py") and not rest:
            return Path(spec.origin)
    for place in places:
        inner = place.joinpath(*rest)
        for path in (inner / "__init__.py", inner.with_suffix(".py")):
            if path.is_file() and (rest or path.name == "__init__.py"):
                return path
    return None


def _names(items: list[ast.expr]) -> list[ast.Name]:
    return [item for item in items if isinstance(item, ast.Name)]


def _last(item: ast.AST | None) -> str:
    """The last name of an expression: Literal of typing.Literal["a"]."""
    if isinstance(item, ast.Subscript):
        return _last(item.value)
    return item.id if isinstance(item, ast.Name) else item.attr if isinstance(item, ast.Attribute) else ""
