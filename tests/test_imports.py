"""The import rule: every part of the package uses only what stands below it.

entry points and tools -> training, evaluation -> artifact, backbones -> compressors -> plan -> layout -> ops;
`config` and `data` stand on the ground floor, and `data` knows `layout` and `files` only. Model classes are known to
`backbones`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "omnisieve"
MODULES = sorted(PACKAGE.rglob("*.py"))

BELOW_COMPRESSORS = {"plan", "layout", "ops"}
BELOW_BACKBONES = BELOW_COMPRESSORS | {"compressors"}
BELOW_TRAINING = BELOW_BACKBONES | {"artifact", "backbones", "config", "data", "files"}
MAY_USE: dict[str, set[str]] = {
    "ops": set(),
    "layout": {"ops"},
    "plan": {"layout", "ops"},
    "compressors": BELOW_COMPRESSORS,
    "method_help": {"compressors"},
    "config": set(),
    "files": set(),
    "data": {"layout", "files"},
    "hub": BELOW_BACKBONES,
    "model_card": {"hub"},
    "artifact": BELOW_BACKBONES | {"files", "hub", "model_card"},
    "published": BELOW_BACKBONES | {"artifact"},
    "backbones": BELOW_BACKBONES | {"config", "data"},
    "trained_llm": BELOW_TRAINING,
    "training": BELOW_TRAINING | {"trained_llm"},
    "evaluation": BELOW_TRAINING | {"trained_llm"},
    "__init__": BELOW_TRAINING | {"trained_llm", "training", "evaluation"},
}
# Methods that users expect on a compressor are names for functions above: imported when called, here alone.
WHEN_CALLED = {"compressors/pretrained.py": {"omnisieve.artifact"}}
WITHOUT_TRANSFORMERS = {"ops", "layout", "plan", "compressors", "config", "hub", "artifact", "published"}
MODEL_NAMES = ("ForConditionalGeneration", "ForCausalLM", "Model", "PreTrainedModel")
MODEL_MODULES = tuple(
    f"transformers.{module}"
    for module in ("models", "modeling", "masking_utils", "integrations", "cache_utils", "generation")
)


def part_of(module: Path) -> str:
    """The part of the house that a file belongs to: `ops`, `layout`, ..."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(source: str, package: str = "omnisieve") -> Iterator[str]:
    """Full dotted names that a source text imports, anywhere in it; `package` resolves relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def without_functions(source: str) -> str:
    """A source text whose functions do nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def upward_imports(source: str, part: str, package: str = "omnisieve") -> list[str]:
    """Imports of a file of `part` that the rule forbids."""
    forbidden = []
    for name in imported_names(source, package):
        words = name.split(".")
        if words[0] in {"train", "eval", "tools", "tests"}:
            forbidden.append(name)
        if words[0] == "omnisieve" and name != "omnisieve.__version__":
            used = words[1] if len(words) > 1 else "__init__"
            if used != part and used not in MAY_USE[part]:
                forbidden.append(name)
    return forbidden


def model_imports(source: str, part: str) -> list[str]:
    """Imports of transformers that only `backbones` may have; the lowest parts may have none at all."""
    names = [name for name in imported_names(source) if f"{name}.".startswith("transformers.")]
    if part == "backbones":
        return []
    if part in WITHOUT_TRANSFORMERS:
        return names
    return [name for name in names if name.startswith(MODEL_MODULES) or name.endswith(MODEL_NAMES)]


def package_of(module: Path) -> str:
    return ".".join(["omnisieve", *module.relative_to(PACKAGE).parent.parts])


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.relative_to(PACKAGE).as_posix())
def test_imports_run_down_only(module: Path):
    part, source = part_of(module), module.read_text(encoding="utf-8")
    assert part in MAY_USE, f"{part} is new: give it a floor in MAY_USE, and in the design"
    allowed = WHEN_CALLED.get(module.relative_to(PACKAGE).as_posix(), set())
    assert not upward_imports(without_functions(source), part, package_of(module))
    assert {name.rpartition(".")[0] for name in upward_imports(source, part, package_of(module))} <= allowed
    assert not model_imports(source, part)


def test_the_rule_has_no_cycles():
    def depth(part: str, above: tuple[str, ...] = ()) -> int:
        assert part not in above, f"cycle: {' -> '.join([*above, part])}"
        return 1 + max((depth(lower, (*above, part)) for lower in MAY_USE[part]), default=0)

    assert {part: depth(part) for part in ("ops", "layout", "plan", "compressors")} == {
        "ops": 1,
        "layout": 2,
        "plan": 3,
        "compressors": 4,
    }
    assert depth("__init__") > depth("training") > depth("backbones") > depth("compressors")


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("ops", "from omnisieve.layout import TokenLayout"),
        ("layout", "import omnisieve.plan"),
        ("compressors", "def f():\n    from omnisieve.backbones import attach"),
        ("compressors", "from omnisieve import artifact"),
        ("compressors", "from ..backbones import attach"),
        ("data", "from omnisieve.ops.topk import topk_mask"),
        ("data", "from omnisieve.config import TrainConfig"),
        ("config", "from omnisieve.compressors import Compressor"),
        ("backbones", "from omnisieve.training import Trainer"),
        ("training", "from omnisieve.evaluation import run"),
        ("training", "from omnisieve import attach"),
        ("training", "import omnisieve"),
        ("evaluation", "import train"),
    ],
)
def test_an_upward_import_is_found(part: str, source: str):
    assert upward_imports(source, part, f"omnisieve.{part}")


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("compressors", "import transformers"),
        ("plan", "from transformers import AutoProcessor"),
        ("data", "from transformers import Qwen2_5OmniThinkerForConditionalGeneration"),
        ("training", "from transformers import AutoModel"),
        ("evaluation", "from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb"),
        ("evaluation", "from transformers.cache_utils import DynamicCache"),
    ],
)
def test_a_model_outside_backbones_is_found(part: str, source: str):
    assert model_imports(source, part)


def test_allowed_imports_are_allowed():
    assert not upward_imports("from omnisieve.ops.topk import topk_mask\nimport torch", "layout")
    assert not upward_imports("from omnisieve.data.batch import Batch", "data")
    assert not upward_imports("from .topk import topk_mask", "ops", "omnisieve.ops")
    assert not upward_imports("from omnisieve import __version__", "artifact")
    assert not model_imports("from transformers import AutoProcessor, WhisperFeatureExtractor", "data")
    assert not model_imports("from transformers import Qwen2_5OmniThinkerForConditionalGeneration", "backbones")
