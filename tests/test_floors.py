"""The house's floors: who may import whom, what loads without what, and the outer form of the modules."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# floor, what its modules load (numpy: neither torch nor Ray; triton: what comes with torch for CUDA alone, so others
# import them where they need them), beginnings of their names; the longest one decides.
FLOORS = (
    (0, "numpy", "train.config train.records train.mesh train.comm.plan"),
    (1, "numpy", "train.comm.algorithms train.comm.tree train.sim"),
    (2, "numpy", "train.emulator train.report train.claims train.conditions train.retime train.mlperf_import"),
    (2, "torch", "train.comm train.data train.models train.optim train.metrics train.checkpoint train.precision"),
    (2, "torch", "train.memory train.tensorboard train.progress train.mlperf_log train.trace train.comm.plan_group"),
    (2, "triton", "train.models.chip_norm_cuda train.models.max_pool_cuda"),
    (2, "torch", "train.compute"),
    (3, "torch", "train.trainer train.recovery"),
    (4, "torch", "train.callbacks"),
    (5, "torch", "train.build train.account"),
    (6, "torch", "launch"),
)
BLOCKED = "hydra omegaconf ray sklearn tensorboard matplotlib PIL rich torchvision mlperf_logging".split()
MAY_INSTANTIATE = ("train.build", "train.emulator*")


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted([*ROOT.glob("train/**/*.py"), *ROOT.glob("launch/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
LIBRARY = [name for name in MODULES if name.startswith("train")]
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def floor(module: str) -> tuple[int, str]:
    """A package itself (its __init__ is empty) is on the ground floor."""
    if MODULES[module].name == "__init__.py":
        return 0, "numpy"
    covering = [
        (len(name), number, loads)
        for number, loads, names in FLOORS
        for name in names.split()
        if module.startswith(name)
    ]
    if not covering:
        raise LookupError(f"{module} stands on no floor: give it one in FLOORS (and in the design)")
    return max(covering)[1:]


def imports(module: str) -> list[tuple[str, bool]]:
    """Every imported module (or module.name), and whether the import runs with the module's own."""
    late = {
        id(inner)
        for item in ast.walk(TREES[module])
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(item)
        for inner in ast.walk(item)
    }
    found = []
    for item in ast.walk(TREES[module]):
        if isinstance(item, ast.Import):
            found += [(alias.name, id(item) not in late) for alias in item.names]
        elif isinstance(item, ast.ImportFrom):
            source = "relative" if item.level else item.module
            found += [(f"{source}.{alias.name}", id(item) not in late) for alias in item.names]
    return found


def is_type_checking(item: ast.AST) -> bool:
    return isinstance(item, ast.If) and isinstance(item.test, ast.Name) and item.test.id == "TYPE_CHECKING"


def own(name: str) -> str | None:
    """The module of ours that an imported name is, or lies in."""
    return next((module for module in (name, name.rpartition(".")[0]) if module in MODULES), None)


def none_of(complaints: list[str]) -> None:
    assert not complaints, "\n".join(complaints)


def test_every_module_stands_on_a_floor() -> None:
    complaints = []
    for module in MODULES:
        try:
            floor(module)
        except LookupError as error:
            complaints.append(str(error))
    none_of(complaints)


def test_modules_import_their_own_floor_and_lower_ones() -> None:
    arrows = [(module, own(name)) for module in MODULES for name, _ in imports(module) if own(name)]
    none_of([f"{module} imports {name}, a floor above" for module, name in arrows if floor(name)[0] > floor(module)[0]])


def test_library_knows_neither_ray_nor_hydra() -> None:
    foreign = [(module, name, at_top) for module in LIBRARY for name, at_top in imports(module)]
    none_of([f"{m} imports {name}" for m, name, _ in foreign if name.split(".")[0] in ("ray", "omegaconf", "relative")])
    hydra = [(module, name, at_top) for module, name, at_top in foreign if name.split(".")[0] == "hydra"]
    for module, name, at_top in hydra:
        narrow = name in ("hydra.utils.instantiate", "hydra.errors.InstantiationException")
        assert narrow and not at_top, f"{module} imports {name}: only instantiate and its error, inside a function"
        assert any(fnmatch(module, pattern) for pattern in MAY_INSTANTIATE), f"{module} may not instantiate"


def test_library_loads_torch_and_numpy_alone() -> None:
    complaints = []
    for module in LIBRARY:
        own = {"numpy": set(), "torch": {"torch"}, "triton": {"torch", "triton"}}[floor(module)[1]]
        allowed = {"train", "numpy"} | own | sys.stdlib_module_names
        loaded = [name for name, at_top in imports(module) if at_top]
        complaints += [f"{module} loads {name}" for name in loaded if name.split(".")[0] not in allowed]
    none_of(complaints)


IMPORT_ALL = """
import importlib, sys
blocked, names = set(sys.argv[1].split()), sys.argv[2].split()

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.mark.parametrize("without", [[], ["torch"]], ids=["floors 0 to 4", "numpy only"])
def test_modules_import_without_the_rest(without: list[str]) -> None:
    numpy_only = bool(without)
    names = [m for m in MODULES if (floor(m)[1] == "numpy" if numpy_only else floor(m)[0] <= 4)]
    if find_spec("triton") is None:
        names = [m for m in names if floor(m)[1] != "triton"]
    command = [sys.executable, "-c", IMPORT_ALL, " ".join(BLOCKED + without), " ".join(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(names)}\n", "an import printed something"


def test_modules_are_short_and_say_what_they_are() -> None:
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if path.name == "__init__.py":
            assert not text.strip(), f"{path} is not empty"
        else:
            assert text.count("\n") <= 400, f"{module} has more than 400 lines"
            assert ast.get_docstring(TREES[module]), f"{module} has no docstring"
            assert path.name != "utils.py", f"{path}: name it after what it does"


def test_library_prints_nothing_but_the_report() -> None:
    for module in LIBRARY:
        for item in TREES[module].body:
            calls = [call.func for call in ast.walk(item) if isinstance(call, ast.Call)]
            prints = any(isinstance(called, ast.Name) and called.id == "print" for called in calls)
            may = module.startswith("train.report") and getattr(item, "name", "") == "main"
            assert may or not prints, f"{module}, line {item.lineno}: print"
