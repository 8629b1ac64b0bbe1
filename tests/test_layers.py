"""Who may import whom, and what every file keeps to; each rule is shown to catch a breach."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "mpjax").rglob("*.py"))
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))

# What reads nobody else's state and says what is wrong: every part may import it.
COMMON = {"errors", "json_text", "lazy", "markdown", "paths", "plain_pickle", "typing"}
# part -> the parts of mpjax that it may import, besides itself and COMMON (CONTRIBUTING.md).
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "json_text": set(),
    "lazy": set(),
    "markdown": set(),
    "paths": set(),
    "plain_pickle": set(),
    "typing": {"precision"},  # for a type checker only
    "formats": set(),
    "precision": {"formats"},
    "interpret": {"formats", "precision", "ops", "probe"},
    "ops": {"formats", "precision"},
    "optim": {"formats", "precision"},
    "models": {"formats", "precision", "ops", "files"},
    "tasks": {"formats", "precision", "ops", "models", "data"},
    "data": {"files"},
    "train": {"formats", "precision", "ops", "optim", "interpret", "data", "files"},
    "report": {"formats", "files", "train"},  # reads what runs wrote and draws it
    "commands": {"data"},
    "replay": {"commands", "train", "models", "optim", "precision"},  # rebuilds a run's step
    "finetuning": {
        "formats",
        "precision",
        "ops",
        "optim",
        "models",
        "tasks",
        "data",
        "train",
        "files",
        "report",
    },  # from data to a model in use: it uses every part
    "targets": {
        "commands",
        "precision",
        "ops",
        "optim",
        "models",
        "interpret",
        "train",
        "files",
        "probe",
    },  # compiles a step for chips that are not here
    "predict": {"commands", "data", "finetuning"},  # command lines
    "export": {"commands", "finetuning"},
    "probe": set(),
    "doctor": {"probe"},  # it stays light: a broken part must not keep it from starting
}
# Rooms of a part that do not import each other, and what all of them stand on.
ROOMS = {
    "interpret": ({"autocast", "audit", "monitor", "nonfinite"}, {"core"}),
    "models": ({"transformer", "recurrent", "resnet"}, {"core"}),
}
MOST_MODULES = 14  # in a folder
# Modules of one name that are the same part of several rooms.
SAME_PARTS = {"config", "checks", "report"}
THE_FACE = "__init__"  # mpjax/__init__.py gathers the public names and may import every part
# distribution -> the modules that it gives
MODULE_NAMES = {"orbax-checkpoint": "orbax"}
ONLY_IN = {"flax": "models"}


def _imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every dotted name that a module imports, relative ones resolved against its package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, alias.name)


def breaches(source: str, path: str) -> list[str]:
    """The imports of a module at `path` (from the checkout's root) that its place forbids."""
    parts = Path(path).with_suffix("").parts
    part = parts[1] if parts[0] == "mpjax" else None
    allowed = set(MAY_IMPORT) if part == THE_FACE else MAY_IMPORT.get(part or "", set())
    found = []
    for name in _imports(source, parts[:-1]):
        if part and name[0] == "mpjax":
            target = name[1] if len(name) > 1 else THE_FACE
            known = target in MAY_IMPORT
            if not known or target not in allowed | COMMON | {part}:
                found.append(f"{path}: {'.'.join(name)}")
        if part and name[0] in ("experiments", "tests"):
            found.append(f"{path}: {'.'.join(name)}")
        if name[0] in ONLY_IN and part not in (None, ONLY_IN[name[0]]):
            found.append(f"{path}: {'.'.join(name)}")
        apart, base = ROOMS.get(part or "", (set(), set()))
        here, there = parts[2:3], name[2:3]
        if part and name[:2] == ("mpjax", part) and here and there and here != there:
            if here[0] in apart | base and there[0] in apart:
                found.append(f"{path}: {'.'.join(name)}")
    return found


def crowded(modules: list[str]) -> list[str]:
    """The folders of too many modules."""
    counts = Counter(m.rpartition("/")[0] for m in modules if not m.endswith("__init__.py"))
    return sorted(folder for folder, count in counts.items() if count > MOST_MODULES)


def namesakes(modules: list[str]) -> list[str]:
    """The names that several modules bear."""
    names = Counter(Path(m).stem for m in modules if not Path(m).stem.startswith("__"))
    return sorted(name for name, count in names.items() if count > 1 and name not in SAME_PARTS)


def unmet(source: str, path: str) -> list[str]:
    """Imports that run when the module is imported, of packages that a plain install lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]}
    known = {MODULE_NAMES.get(name, name) for name in required} | {"mpjax"}
    known |= set(sys.stdlib_module_names)
    if path.startswith("experiments/"):
        known |= {script.stem for script in SCRIPTS} | {
            "common"
        }  # a script's own folder is on its path
    top = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
    ]
    names = [name[0] for node in top for name in _imports(ast.unparse(node), ())]
    return [f"{path}: {name}" for name in names if name not in known]


def bare_excepts(source: str) -> list[int]:
    """Lines with an `except:` that names nothing."""
    handlers = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ExceptHandler))
    return [handler.lineno for handler in handlers if handler.type is None]


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_part_has_its_place() -> None:
    parts = {path.relative_to(ROOT / "mpjax").parts[0].removesuffix(".py") for path in MODULES}
    assert parts - {THE_FACE} <= set(MAY_IMPORT)


def test_nobody_imports_upwards() -> None:
    assert [b for path in MODULES for b in breaches(path.read_text(), _relative(path))] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mpjax/formats/bad.py", "from mpjax.precision import Precision"),
        ("mpjax/formats/bad.py", "from ..precision import policy"),
        ("mpjax/precision/bad.py", "from mpjax import ops"),
        ("mpjax/precision/bad.py", "from .. import ops"),
        ("mpjax/precision/bad.py", "import mpjax"),
        ("mpjax/ops/bad.py", "import flax.linen as nn"),
        ("mpjax/optim/bad.py", "def f():\n    from mpjax.models import decoder"),
        ("mpjax/train/bad.py", "import mpjax.models.transformer.decoder"),
        ("mpjax/train/bad.py", "from mpjax.tasks import lm"),
        ("mpjax/data/bad.py", "from mpjax.train import state"),
        ("mpjax/interpret/bad.py", "from mpjax.optim import wrap"),
        ("mpjax/interpret/audit/bad.py", "from mpjax.interpret.monitor.measure import measure"),
        ("mpjax/interpret/audit/bad.py", "from ..autocast import rules"),
        ("mpjax/interpret/core/bad.py", "from mpjax.interpret.audit import audit"),
        ("mpjax/models/resnet/bad.py", "import mpjax.models.transformer.block"),
        ("mpjax/models/core/bad.py", "from mpjax.models.recurrent.cell import Cell"),
        ("mpjax/doctor.py", "from mpjax.models import decoder"),
        ("mpjax/models/bad.py", "from experiments import train_lm"),
        ("mpjax/models/bad.py", "from mpjax.new_part import x"),
    ],
)
def test_a_bad_import_is_caught(path: str, source: str) -> None:
    assert len(breaches(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mpjax/__init__.py", "from mpjax.models import decoder"),
        ("mpjax/models/good.py", "import flax\nfrom mpjax.ops import norm\nfrom . import layers"),
        ("mpjax/train/good.py", "from mpjax.optim import wrap\nfrom mpjax.errors import X"),
        ("mpjax/formats/good.py", "from mpjax.formats.format_table import Format"),
        ("mpjax/interpret/audit/good.py", "from mpjax.interpret.core.walk import walk"),
        ("mpjax/models/inference/good.py", "from mpjax.models.transformer.kv_cache import read"),
        ("experiments/good.py", "import mpjax\nimport flax\nfrom mpjax.models import decoder"),
    ],
)
def test_a_good_import_is_not(path: str, source: str) -> None:
    assert breaches(source, path) == []


def test_a_plain_install_has_what_is_imported() -> None:
    files = MODULES + SCRIPTS
    assert [name for path in files for name in unmet(path.read_text(), _relative(path))] == []
    assert unmet("import pyarrow", "x.py") == ["x.py: pyarrow"]
    assert unmet("import no_such_script", "experiments/x.py")
    assert unmet("from orbax import checkpoint\nimport jax.numpy, json", "x.py") == []
    assert unmet("def f():\n    import pyarrow", "x.py") == []


# Words that stood for many things; the field's own took their place.
RETIRED = {
    *("Sight", "Trunk", "Skeleton", "Place", "Region", "Reach", "Culprit", "Frame", "Watch", "How"),
    *("Factor", "given", "kept", "seen", "bad", "felt", "mine", "how"),
}


def retired(source: str) -> list[str]:
    """The identifiers of a module that are retired words."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sorted({t.string for t in tokens if t.type == tokenize.NAME} & RETIRED)


def test_names_are_the_fields() -> None:
    assert {_relative(p): words for p in MODULES if (words := retired(p.read_text()))} == {}
    assert retired("kept = lambda seen: seen.how\n# given\n") == ["how", "kept", "seen"]


def deep(source: str) -> list[str]:
    """Modules more than two levels below mpjax that are imported from."""
    nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom))
    names = [node.module or "" for node in nodes]
    return [name for name in names if name.startswith("mpjax.") and name.count(".") > 2]


def test_experiments_need_the_public_face_alone() -> None:
    assert [name for path in SCRIPTS for name in deep(path.read_text())] == []
    assert deep("from mpjax.train.report.progress import ProgressBar")


def test_folders_show_what_is_in_them() -> None:
    modules = [_relative(path) for path in MODULES]
    assert crowded(modules) == [] and namesakes(modules) == []
    assert crowded([f"mpjax/a/{i}.py" for i in range(15)]) == ["mpjax/a"]
    assert namesakes(["mpjax/a/x.py", "mpjax/b/x.py", "mpjax/a/config.py"]) == ["x"]


def missing(page: str) -> list[str]:
    """The files that a page of docs names and that are not in the package."""
    named = re.findall(r"\b[\w/]+/\w+\.py\b", page)
    return [name for name in named if not (ROOT / "mpjax" / name).exists()]


def test_the_ways_are_through_files_that_exist() -> None:
    page = (ROOT / "docs/how/walks.md").read_text()
    assert page.count(".py") > 50
    assert missing(page) == []
    assert missing("optim/gone.py and `train/step.py`") == ["optim/gone.py"]


def test_modules_are_short() -> None:
    assert MODULES
    assert [_relative(p) for p in MODULES if len(p.read_text().splitlines()) > 500] == []


def test_no_except_without_a_name() -> None:
    files = [*MODULES, *SCRIPTS, *sorted((ROOT / "tests").rglob("*.py"))]
    assert [_relative(p) for p in files if bare_excepts(p.read_text())] == []
    assert bare_excepts("try:\n    f()\nexcept:\n    pass") == [3]
    assert bare_excepts("try:\n    f()\nexcept (OSError, ValueError):\n    pass") == []


def test_modules_say_what_they_are() -> None:
    silent = [
        _relative(p)
        for p in [*MODULES, *SCRIPTS]
        if not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert silent == []


def misread(source: str) -> list[str]:
    """What the site would not show as it is meant: a text before a colon in the first line of a
    property is its type there, and `name: X.` a list that is lettered.
    """
    found = re.findall(r"^ +\w+: [A-Z]\.$", source, re.M)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if marks & {"property", "cached_property"} and ": " in first:
                found.append(first)
    return found


def test_docstrings_are_read_as_they_are_meant() -> None:
    assert [(_relative(p), found) for p in MODULES if (found := misread(p.read_text()))] == []
    assert misread('def f():\n    """Of.\n\n    Args:\n      batch: B.\n    """\n')
    assert misread('@property\ndef f():\n    """Its size: of both."""\n')
    assert not misread('def f():\n    """Its size: of both."""\n')


# Written in pieces, so that this file does not hold what it forbids.
_PLACES = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:home|root|Users|work|tmp/w)" + "/(?!someone|user|you)",
            r"https?://[^\s/]*(?:pypi|pythonhosted|artifactory|nexus)[^\s/]*/",
            r"(?:--(?:extra-)?" + r"index-url|find-" + r"links)\b",
        ]
    )
)


def test_no_file_names_this_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file():  # deleted and not yet committed
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        lines = text.splitlines()
        found += [f"{name}:{i}" for i, line in enumerate(lines, 1) if _PLACES.search(line)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'open("/' + 'root/data.txt")',
        "see /" + "home/ci/x",
        "--index" + "-url https://pypi" + ".org/simple",
        "https://files.python" + "hosted.org/packages/x.whl",
    ],
)
def test_a_machines_name_is_caught(line: str) -> None:
    assert _PLACES.search(line)


def test_a_web_page_is_no_index() -> None:
    assert not _PLACES.search("see https://arxiv.org/abs/1710.03740 and tests/home/x")
