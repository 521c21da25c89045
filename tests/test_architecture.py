"""The levels of docs/design/architecture.md, purity, and the absence of module-level state, read from the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

import architecture_rules as rules
from architecture_rules import LEVELS, RULES, Rule, Source

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_PRODUCT = {".git", ".venv", "build", "dist", "demo", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
TEXT_SUFFIXES = {"", ".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".txt", ".cpp", ".cfg", ".json"}

# (rule, module, text that breaks the rule)
BAD = [
    (rules.imports_go_down, "megatron.core.layout", "from megatron.training import build"),
    (rules.imports_go_down, "megatron.core.topology", "def f():\n    import megatron.model.stage"),
    (rules.imports_go_down, "megatron.core.topology", "from ..model import stage"),
    (rules.imports_go_down, "megatron.core.topology", "from megatron import model"),
    (rules.imports_go_down, "megatron.tokenizer.null", "from megatron.data import indexed"),
    (rules.imports_go_down, "megatron.core.random", "import megatron.core.topology"),
    (rules.imports_go_down, "megatron.model.norm", "from tests import distributed"),
    (rules.imports_go_down, "megatron.model.norm", "import tools.preprocess_data"),
    (rules.imports_go_down, "megatron.utils", ""),
    (rules.schedules_and_numbers_are_pure, "megatron.core.pipeline.schedules", "import torch"),
    (rules.schedules_and_numbers_are_pure, "megatron.core.pipeline.lowering", "from torch import Tensor"),
    (rules.schedules_and_numbers_are_pure, "megatron.core.pipeline.drawing", "from .executor import run"),
    (rules.schedules_and_numbers_are_pure, "megatron.core.sharding", "import torch.distributed as dist"),
    (rules.schedules_and_numbers_are_pure, "megatron.core.layout", "import torch\nr = torch.distributed.get_rank"),
    (rules.communication_is_set_up_in_one_place, "megatron.training.build", "dist.init_process_group('gloo')"),
    (rules.communication_is_set_up_in_one_place, "megatron.cli.entry", "DeviceMesh('cpu', ranks)"),
    (rules.communication_is_set_up_in_one_place, "megatron.optimizer.step", "isinstance(p, DTensor)"),
    (rules.the_environment_is_read_in_one_place, "megatron.model.attention", "import os\nx = os.environ['RANK']"),
    (rules.the_environment_is_read_in_one_place, "tools.preprocess_data", "from os import getenv"),
    (rules.nothing_is_unpickled, "megatron.checkpoint.storage", "torch.load(path)"),
    (rules.nothing_is_unpickled, "megatron.checkpoint.storage", "torch.load(path, weights_only=False)"),
    (rules.nothing_is_unpickled, "megatron.data.index_cache", "np.load(path, allow_pickle=True)"),
    (rules.nothing_is_unpickled, "megatron.data.index_cache", "import pickle"),
    (rules.nothing_is_unpickled, "megatron.checkpoint.inert_pickle", "import dill"),
    (rules.nothing_is_unpickled, "megatron.checkpoint.inert_pickle", "import pickle\npickle.load(file)"),
    (rules.optional_packages_are_imported_late, "megatron.model.attention", "from flash_attn import flash_attn_func"),
    (rules.optional_packages_are_imported_late, "megatron.checkpoint.hf", "import transformers"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "_GROUPS = {}"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "NAMES = ['tp', 'pp']"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "NESTED = (1, [2])"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "WRAPPED = MappingProxyType({'a': []})"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "SEEN = set()"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "CACHE: dict[str, int] = {}"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "_topology = None"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "def f():\n    global T\n    T = 1"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "torch.manual_seed(0)"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "for name in NAMES:\n    register(name)"),
    (rules.modules_hold_no_mutable_state, "megatron.core.topology", "if FAST:\n    TABLE = dict()"),
]
# (rule, module, text that keeps the rule, close to one that breaks it)
GOOD = [
    (rules.nothing_is_unpickled, "megatron.checkpoint.inert_pickle", "import pickle"),
    (rules.imports_go_down, "megatron.training.build", "from megatron.core.topology import Topology"),
    (rules.imports_go_down, "megatron.core.collectives", "from megatron.core.topology import Axis"),
    (rules.imports_go_down, "megatron.core.pipeline.lowering", "from .actions import Action"),
    (rules.schedules_and_numbers_are_pure, "megatron.core.sharding", "import torch"),
    (rules.schedules_and_numbers_are_pure, "megatron.core.pipeline.executor", "import torch"),
    (rules.communication_is_set_up_in_one_place, "megatron.core.topology", "dist.init_process_group('gloo')"),
    (rules.communication_is_set_up_in_one_place, "megatron.training.build", "def f(mesh: DeviceMesh):\n    ..."),
    (rules.the_environment_is_read_in_one_place, "megatron.tokenizer.huggingface", "os.environ['THREADS'] = '1'"),
    (rules.nothing_is_unpickled, "megatron.checkpoint.storage", "torch.load(path, weights_only=True)"),
    (rules.optional_packages_are_imported_late, "megatron.model.attention", "def f():\n    import flash_attn"),
    (rules.modules_hold_no_mutable_state, "megatron.model.presets", "NAMES = ('a', 'b')\nCODES = frozenset({1})"),
    (rules.modules_hold_no_mutable_state, "megatron.model.presets", "T: Mapping[str, int] = {'a': 1}"),
    (rules.modules_hold_no_mutable_state, "megatron.model.presets", "Name = Literal['a']\nAlias = dict[str, int]"),
    (rules.modules_hold_no_mutable_state, "megatron.model.presets", "T = MappingProxyType({k: (k,) for k in NAMES})"),
    (
        rules.modules_hold_no_mutable_state,
        "megatron.model.presets",
        "def make(n) -> Config:\n    return Config(n)\n\nONE, TWO = Config(1), make(2)",  # Config is a frozen dataclass
    ),
]


def a_file(module: str, text: str) -> Source:
    return Source(module, text, modules=frozenset(LEVELS), frozen_classes=frozenset({"Config"}))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_product_keeps_the_rule(rule: Rule) -> None:
    violations = [violation for source in rules.product_sources(REPOSITORY) for violation in rule(source)]
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize(("rule", "module", "text"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_a_file_that_breaks_the_rule_is_found(rule: Rule, module: str, text: str) -> None:
    (*violations,) = rule(a_file(module, text))
    assert violations
    assert all(module in violation and ": " in violation for violation in violations)


@pytest.mark.parametrize(("rule", "module", "text"), GOOD, ids=lambda value: getattr(value, "__name__", None))
def test_a_file_that_keeps_the_rule_passes(rule: Rule, module: str, text: str) -> None:
    assert list(rule(a_file(module, text))) == []


def test_every_rule_has_an_example_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES)


def test_no_file_names_a_path_of_its_authors_machine() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}: {', '.join(paths)}; write a placeholder such as /path/to/data"
        for path in text_files()
        if (paths := rules.machine_paths(path.read_text(errors="replace")))
    ]
    assert not found, "\n" + "\n".join(found)


def test_machine_paths_are_told_from_placeholders_and_addresses() -> None:
    home = "/" + "home/jane/data"  # written in two parts: this file is read as well
    assert rules.machine_paths(f"--data_path {home}/corpus") == ["/" + "home/jane"]
    assert rules.machine_paths("/path/to/data https://host/home/page $HOME/home/x a/home/b") == []


def text_files() -> list[Path]:
    """Everything under the repository but generated folders and sample data."""
    top = (path for path in REPOSITORY.iterdir() if path.name not in NOT_PRODUCT and path.suffix != ".egg-info")
    files = (file for entry in top for file in ([entry] if entry.is_file() else entry.rglob("*")) if file.is_file())
    samples = REPOSITORY / "tests" / "data"
    return [
        file
        for file in files
        if file.suffix in TEXT_SUFFIXES and (file.suffix == ".py" or not file.is_relative_to(samples))
    ]
