"""The documentation site: `make docs`; warnings are errors, nothing is fetched."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import sys
from collections import _tuplegetter
from collections.abc import Container
from pathlib import Path
from types import FunctionType, GenericAlias, ModuleType

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import mpjax

project, author, copyright = "mpjax", "the authors of mpjax", "the authors of mpjax"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_math_dollar",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
]
html_theme, html_title, html_static_path = "sphinx_book_theme", "mpjax", ["site.css"]
html_css_files = ["site.css"]
html_extra_path = ["llms.txt"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
exclude_patterns = ["_build"]
highlight_language = "none"  # of a block that names no language: a diagram, an output
default_role = "code"  # docstrings are written with Markdown's backticks
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs are those that the notebooks were committed with
autodoc_member_order, autodoc_typehints = "groupwise", "none"
autodoc_preserve_defaults = True  # as the source has them
autodoc_default_options = {"members": True, "imported-members": True}
napoleon_numpy_docstring, napoleon_use_rtype = False, False
suppress_warnings = ["mystnb.unknown_mime_type", "config.cache"]
copybutton_exclude = ".linenos, .gp, .go"

# Each public name has its entry in the page of the first package that exports it.
TITLES = {
    "mpjax": "Everything at once",
    "mpjax.formats": "Number formats",
    "mpjax.precision": "Policies, rules, Precision, schedules",
    "mpjax.ops": "Operations",
    "mpjax.ops.products": "Operands of quantised products",
    "mpjax.optim": "Optimizers and loss scales",
    "mpjax.optim.annealing": "Simulated annealing",
    "mpjax.optim.compression": "Compressed gradients",
    "mpjax.interpret": "autocast, audit, monitor, trace_nonfinite",
    "mpjax.models": "Models",
    "mpjax.models.hf": "Checkpoints of others",
    "mpjax.tasks": "Objectives and metrics",
    "mpjax.tasks.adversarial": "Adversarial training",
    "mpjax.data": "Data",
    "mpjax.data.augment": "Augmentation",
    "mpjax.data.chat": "Conversations",
    "mpjax.train": "Training",
    "mpjax.train.stages": "Stages of a plan",
    "mpjax.train.checkpoint": "Checkpoints",
    "mpjax.train.processes": "Several processes",
    "mpjax.train.report": "What a run tells",
    "mpjax.finetuning": "From own data to a model in use",
    "mpjax.targets": "Steps compiled for chips that are not here",
    "mpjax.report": "Tables, plots and pages",
    "mpjax.typing": "Types",
}


def public_packages() -> list[str]:
    """Returns the packages that export names, the outermost first."""
    found = ["mpjax"]
    for module in pkgutil.walk_packages(mpjax.__path__, "mpjax."):
        if not (module.ispkg or module.name == "mpjax.typing"):
            continue
        if getattr(importlib.import_module(module.name), "__all__", ()):
            found.append(module.name)
    return sorted(found, key=lambda name: list(TITLES).index(name))


def write_api(folder: Path) -> None:
    """Writes a page for each package that exports names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names, documented = public_packages(), {}
    for name in names:
        package = importlib.import_module(name)
        lines, elsewhere = [f"# {TITLES[name]}", "", f"`{name}`", ""], []
        for each in sorted(package.__all__, key=str.lower):
            value = getattr(package, each)
            if isinstance(value, ModuleType):
                continue
            if (key := (each, id(value))) in documented:
                elsewhere.append(
                    f"`{each}` is described in [{documented[key]}]({documented[key]}.md)."
                )
                continue
            documented[key] = name
            lines += ["```{eval-rst}", *_entry(f"{name}.{each}", value), "```", ""]
        text = "\n".join(lines + elsewhere)
        (folder / f"{name}.md").write_text(text + "\n")
    table = "\n".join(names)
    (folder / "index.md").write_text(
        "# API\n\nEvery public name, by the package that exports it; written from the docstrings."
        f"\n\n```{{toctree}}\n:maxdepth: 1\n\n{table}\n```\n"
    )


def _entry(path: str, value: object) -> list[str]:
    """The directive that describes a public name."""
    if isinstance(value, type) and not isinstance(value, GenericAlias):
        return [f".. autoclass:: {path}"]
    if isinstance(value, FunctionType) or hasattr(value, "__wrapped__"):
        return [f".. autofunction:: {path}"]
    return [f".. py:data:: {path}", f"   :value: {' '.join(repr(value).split())[:120]}"]


def undocumented(described: Container[str]) -> list[str]:
    """Returns the public names that no page describes under any package that exports them."""
    places: dict[tuple[str, int], list[str]] = {}
    for name in public_packages():
        package = importlib.import_module(name)
        for each in package.__all__:
            value = getattr(package, each)
            if not isinstance(value, ModuleType):
                places.setdefault((each, id(value)), []).append(f"{name}.{each}")
    return [names[0] for names in places.values() if not any(n in described for n in names)]


def skip_field(
    app: Sphinx, kind: str, name: str, value: object, skip: bool, options: object
) -> bool | None:
    """Leaves the fields of a NamedTuple to the Args of its class."""
    return isinstance(value, _tuplegetter) or None


def check_names(app: Sphinx, exception: Exception | None) -> None:
    """Fails the build where a public name has no entry."""
    if exception is None and (missing := undocumented(app.env.domains["py"].objects)):
        raise ExtensionError(f"public names without an entry: {', '.join(missing)}")


def setup(app: Sphinx) -> None:
    """Writes the API's pages, and copies the notebooks."""
    app.connect("build-finished", check_names)
    app.connect("autodoc-skip-member", skip_field)
    write_api(HERE / "api")
    shutil.rmtree(HERE / "notebooks", ignore_errors=True)
    shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks")
    index = "# Notebooks\n\n```{toctree}\n:maxdepth: 1\n:glob:\n\n0*\n```\n"
    (HERE / "notebooks" / "index.md").write_text(index)
