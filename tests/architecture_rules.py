"""The rules of the architecture, each a function from a source file to what is wrong with it.

A rule reads the syntax tree only, never imports the code, and says in its message what to do instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# A unit may import units of lower levels, and of its own level where SIDEWAYS says so.
LEVELS: Mapping[str, int] = {
    "megatron": 0,  # the package's own __init__, and that of megatron.core
    "megatron.durable": 0,
    "megatron.errors": 0,
    "megatron.core.layout": 0,
    "megatron.core.sharding": 0,
    "megatron.core.collectives": 1,
    "megatron.core.fusion": 1,
    "megatron.core.random": 1,
    "megatron.core.topology": 1,
    "megatron.core.tensor_parallel": 2,
    "megatron.core.pipeline": 2,
    "megatron.core.data_parallel": 2,
    "megatron.core.recompute": 2,
    "megatron.core.replication": 2,
    "megatron.model": 3,
    "megatron.peft": 3,
    "megatron.optimizer": 3,
    "megatron.data": 3,
    "megatron.tokenizer": 3,
    "megatron.checkpoint": 4,
    "megatron.config": 5,
    "megatron.cli": 5,
    "megatron.training": 6,
    "finetune": 7,
    "verify_correctness": 7,
    "tools": 7,
    "weights_conversion": 7,
    "benchmarks": 7,
    "examples": 7,
}
SIDEWAYS = frozenset(
    {
        ("megatron.core.layout", "megatron.errors"),
        ("megatron.core.sharding", "megatron.errors"),
        ("megatron.core.collectives", "megatron.core.topology"),
        ("megatron.core.data_parallel", "megatron.core.replication"),
        ("megatron.data", "megatron.tokenizer"),
        ("megatron.peft", "megatron.model"),
        ("megatron.config", "megatron.cli"),
    }
)
# Files of megatron/core/pipeline that execute; all others there are pure and run without torch.
EXECUTING = frozenset({"megatron.core.pipeline", "megatron.core.pipeline.executor", "megatron.core.pipeline.p2p"})
ENVIRONMENT_READERS = ("megatron.core.topology", "megatron.training.logging")
OPTIONAL_PACKAGES = frozenset(
    {"bitsandbytes", "flash_attn", "fsspec", "gigatoken", "orjson", "peft", "pyarrow", "s3fs"}
    | {"transformers", "wandb", "zstandard"}
)
# Reads pickles by an unpickler of its own that imports nothing; all other pickled files go through torch.load.
UNPICKLERS = frozenset({"megatron.checkpoint.inert_pickle"})
MESH_MAKERS = frozenset({"init_process_group", "init_device_mesh", "DeviceMesh"})
IMMUTABLE_CALLS = (
    frozenset({"MappingProxyType", "frozenset", "join", "partial", "range", "replace", "tuple"})
    | {"bytes", "float", "int", "len", "max", "min", "str"}
    | {"Path", "PurePosixPath", "Struct", "compile", "getattr", "itemgetter", "timedelta"}
    | {"NewType", "ParamSpec", "TypeVar", "get_args", "getLogger"}
    | {"device", "dtype", "finfo"}
)
READ_ONLY_ANNOTATIONS = frozenset({"Mapping", "Sequence", "AbstractSet", "TypeAlias"})


@dataclass(frozen=True)
class Source:
    """One Python file under its dotted name, with the names of all modules of the tree and its frozen classes."""

    module: str
    text: str
    is_package: bool = False
    modules: frozenset[str] = frozenset()
    frozen_classes: frozenset[str] = frozenset()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> tuple[tuple[int, str], ...]:
        """(line, module or member) of every import in the file, in functions and under TYPE_CHECKING too."""
        found: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                names = [f"{base}.{alias.name}" for alias in node.names]
                found += [(node.lineno, name if self._is_member_module(name) else base) for name in names]
        return tuple(found)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.module.split(".")
        kept = parts[: len(parts) - node.level + (1 if self.is_package else 0)]
        return ".".join([*kept, *filter(None, [node.module])])

    def _is_member_module(self, name: str) -> bool:
        return name in self.modules or unit_of(name) == name


Rule = Callable[[Source], Iterator[str]]


def imports_go_down(source: Source) -> Iterator[str]:
    own = unit_of(source.module)
    if own is None:
        yield f"{source.module} has no level: add it to LEVELS in architecture_rules.py and docs/design/architecture.md"
        return
    for line, target in source.imports:
        if target.split(".")[0] == "tests":
            yield f"{source.module}:{line} imports {target}: move what it needs into the product"
        unit = unit_of(target)
        if unit is None or unit == own or (own, unit) in SIDEWAYS:
            continue
        if LEVELS[unit] > LEVELS[own]:
            advice = "pass the value down as an argument, or move the code to the lower level"
            yield f"{source.module}:{line} imports {target}, L{LEVELS[own]} -> L{LEVELS[unit]}: {advice}"
        elif LEVELS[unit] == LEVELS[own] and unit != "megatron":
            advice = "move what both need down a level, or state the direction in SIDEWAYS"
            yield f"{source.module}:{line} imports {target} of its own level {LEVELS[own]}: {advice}"


def schedules_and_numbers_are_pure(source: Source) -> Iterator[str]:
    """Of one file; that pure files import only pure files follows since everything of L0 is checked as well."""
    pipeline = source.module.startswith("megatron.core.pipeline.") and source.module not in EXECUTING
    numbers = source.module in ("megatron.core.layout", "megatron.core.sharding", "megatron.errors")
    for line, target in source.imports:
        if pipeline and (is_in(target, "torch") or target in EXECUTING):
            yield f"{source.module}:{line} imports {target}: a schedule is data; move what needs torch to the executor"
        if numbers and is_in(target, "torch.distributed"):
            yield f"{source.module}:{line} imports {target}: take the rank or size as a number instead"
    if numbers:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
                yield f"{source.module}:{node.lineno} uses torch.distributed: take the rank or size as a number instead"


def communication_is_set_up_in_one_place(source: Source) -> Iterator[str]:
    """A type annotation may name DeviceMesh anywhere; making one, or a process group, is the topology's."""
    if not is_in(source.module, "megatron.core.topology"):
        for node in ast.walk(source.tree):
            called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
            if called in MESH_MAKERS:
                yield f"{source.module}:{node.lineno} calls {called}: take an Axis or the mesh of a Topology instead"
    if not is_in(source.module, "megatron.core.data_parallel"):
        for line, name in identifiers(source.tree):
            if name == "DTensor":
                yield f"{source.module}:{line} mentions DTensor: ask megatron.core.data_parallel for the local tensor"


def the_environment_is_read_in_one_place(source: Source) -> Iterator[str]:
    if any(is_in(source.module, reader) for reader in ENVIRONMENT_READERS):
        return
    # Setting a variable for a library that reads it is no hidden input of ours.
    written = {
        node.value.lineno
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    for line, name in identifiers(source.tree):
        if name in ("environ", "getenv", "environb") and line not in written:
            yield f"{source.module}:{line} reads the environment: add a flag, or use megatron.core.topology"


def nothing_is_unpickled(source: Source) -> Iterator[str]:
    for line, target in source.imports:
        allowed = UNPICKLERS if target == "pickle" else frozenset()
        if target in ("pickle", "dill", "cloudpickle", "marshal", "shelve") and source.module not in allowed:
            yield f"{source.module}:{line} imports {target}: write safetensors or JSON"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            yield f"{source.module}:{node.lineno} calls {called}, which imports what a file names: override find_class"
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield f"{source.module}:{node.lineno} calls torch.load without weights_only=True: add it"
        if keywords.get("allow_pickle", "False") != "False":
            yield f"{source.module}:{node.lineno} allows pickles: leave allow_pickle out"


def optional_packages_are_imported_late(source: Source) -> Iterator[str]:
    for node in source.tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            if name.split(".")[0] in OPTIONAL_PACKAGES and source.module.startswith("megatron."):
                advice = "import it in the function that needs it"
                yield f"{source.module}:{node.lineno} imports {name} at the top: {advice}"


def modules_hold_no_mutable_state(source: Source) -> Iterator[str]:
    """A module only defines: imports, functions, classes, constants.

    A constant is written once, in UPPER_CASE (types in CamelCase; ``logger``; or annotated Final), and its value is
    an expression of literals, tuples, references, frozen dataclasses and calls known to return immutable values.
    A mapping or sequence literal is accepted under the annotation Mapping or Sequence, which the type checker
    then guards. No function has a ``global`` statement. Memoization of a pure function (functools.cache) is no state.
    """
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"{source.module}:{node.lineno} has a global statement: return the value to whoever needs it"
    for statement in _flattened(source.tree.body):
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            yield from _constant_errors(source, statement)
        elif not _only_defines(statement):
            text = ast.unparse(statement).splitlines()[0]
            yield f"{source.module}:{statement.lineno} runs `{text}` on import: do it in a function that is called"


RULES: tuple[Rule, ...] = (
    imports_go_down,
    schedules_and_numbers_are_pure,
    communication_is_set_up_in_one_place,
    the_environment_is_read_in_one_place,
    nothing_is_unpickled,
    optional_packages_are_imported_late,
    modules_hold_no_mutable_state,
)

# Home directories and mount points: a path below them exists on its author's machine only.
MACHINE_PATH = re.compile(r"(?<![\w./~:$}>-])/(?:home|root|Users|work|workspace|mnt|scratch|opt)/[\w.]+")


def machine_paths(text: str) -> list[str]:
    return MACHINE_PATH.findall(text)


def unit_of(module: str) -> str | None:
    """The longest entry of LEVELS that ``module`` is or lies in; a submodule of the bare package has none."""
    candidates = [unit for unit in LEVELS if is_in(module, unit)]
    unit = max(candidates, key=len, default=None)
    return None if unit == "megatron" and module not in ("megatron", "megatron.core") else unit


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name.split(".")[-1]


def frozen_classes(tree: ast.Module) -> frozenset[str]:
    """Names of frozen dataclasses, named tuples and enums."""
    frozen = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            bases = [ast.unparse(base) for base in node.bases]
            if any("dataclass" in d and "frozen=True" in d for d in decorators) or any(
                base.split(".")[-1] in ("NamedTuple", "Enum", "StrEnum", "IntEnum") for base in bases
            ):
                frozen.add(node.name)
    return frozenset(frozen)


def product_sources(repository: Path) -> list[Source]:
    folders = ("megatron", "tools", "weights_conversion", "benchmarks", "examples")
    paths = [*repository.glob("*.py"), *(path for folder in folders for path in (repository / folder).rglob("*.py"))]
    texts = {_module_name(path.relative_to(repository)): path for path in paths if path.name != "setup.py"}
    modules = frozenset(texts)
    frozen = frozenset[str]().union(*(frozen_classes(ast.parse(path.read_text())) for path in texts.values()))
    return [
        Source(module, path.read_text(), path.name == "__init__.py", modules, frozen)
        for module, path in sorted(texts.items())
    ]


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _flattened(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, with those under a condition on versions or types, or guarded, in their place."""
    for statement in body:
        if isinstance(statement, ast.If) and "__name__" not in ast.unparse(statement.test):
            yield from _flattened([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try):
            yield from _flattened([*statement.body, *statement.orelse, *statement.finalbody])
            for handler in statement.handlers:
                yield from _flattened(handler.body)
        else:
            yield statement


def _only_defines(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.If):  # the __name__ guard of a script
        return True
    definitions = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return isinstance(statement, definitions | ast.Pass | ast.Assert | ast.Raise)


def _constant_errors(source: Source, statement: ast.Assign | ast.AnnAssign) -> Iterator[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    annotation = ast.unparse(statement.annotation) if isinstance(statement, ast.AnnAssign) else ""
    names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    for name in names:
        if not re.fullmatch(r"_?[A-Z]\w*|__\w+__|logger", name) and "Final" not in annotation:
            advice = "name a constant in UPPER_CASE or annotate it Final; pass other values as arguments"
            yield f"{source.module}:{statement.lineno} assigns {name}: {advice}"
    read_only = any(word in READ_ONLY_ANNOTATIONS for word in re.findall(r"\w+", annotation)[:2])
    if statement.value is not None and names != ["__all__"] and not read_only:
        for node in _mutable_parts(statement.value, source):
            advice = "use a tuple, frozenset or MappingProxyType, or annotate it Mapping or Sequence"
            yield f"{source.module}:{statement.lineno} keeps the mutable `{ast.unparse(node)[:60]}`: {advice}"


def _mutable_parts(value: ast.expr, source: Source) -> Iterator[ast.expr]:
    """Sub-expressions that make, or may make, a mutable object that the module then holds."""
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp):
        yield value
    elif isinstance(value, ast.Call):
        if not _returns_immutable(value, source):
            yield value
        for argument in [*value.args, *(keyword.value for keyword in value.keywords)]:
            for inner in _held_elements(argument):
                yield from _mutable_parts(inner, source)
    elif isinstance(value, ast.Tuple | ast.BinOp | ast.UnaryOp | ast.BoolOp | ast.IfExp | ast.Starred):
        for child in ast.iter_child_nodes(value):
            if isinstance(child, ast.expr):
                yield from _mutable_parts(child, source)


def _held_elements(argument: ast.expr) -> list[ast.expr]:
    """What an immutable wrapper takes over from its argument: the elements, not the container around them."""
    if isinstance(argument, ast.List | ast.Set | ast.Tuple):
        return argument.elts
    if isinstance(argument, ast.Dict):
        return argument.values
    if isinstance(argument, ast.DictComp):
        return [argument.value]
    if isinstance(argument, ast.ListComp | ast.SetComp | ast.GeneratorExp):
        return [argument.elt]
    return [] if isinstance(argument, ast.Call) else [argument]


def _returns_immutable(call: ast.Call, source: Source) -> bool:
    """A known call, a frozen class or its class method, or a function of this file annotated to return one."""
    parts = ast.unparse(call.func).split(".")
    if parts[-1] in IMMUTABLE_CALLS | source.frozen_classes or parts[0] in source.frozen_classes:
        return True
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == parts[-1] and node.returns is not None:
            returned = re.findall(r"\w+", ast.unparse(node.returns))
            return bool(returned) and returned[0] in IMMUTABLE_CALLS | source.frozen_classes | READ_ONLY_ANNOTATIONS
    return False
