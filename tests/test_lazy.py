"""The public names: each is there, none is hidden by a module, old ones say what they are now."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import mpjax

PACKAGES = sorted(
    module.name for module in pkgutil.walk_packages(mpjax.__path__, "mpjax.") if module.ispkg
)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    found = importlib.import_module(package)
    for name in getattr(found, "__all__", ()):
        assert not isinstance(getattr(found, name), ModuleType), f"{package}.{name}"


def test_no_lazy_name_is_a_module_of_its_package() -> None:
    """A module that is imported becomes an attribute of its package, before `__getattr__`."""
    for package in PACKAGES:
        found = importlib.import_module(package)
        modules = {module.name for module in pkgutil.iter_modules(found.__path__)}
        assert not modules & set(getattr(found, "_LAZY", ())), package


def test_an_old_name_works_and_says_what_it_is_called() -> None:
    models = importlib.import_module("mpjax.models")
    with pytest.warns(FutureWarning, match=r"mpjax.models.Model is called mpjax.models.Decoder"):
        assert models.Model is models.Decoder
    assert models._RENAMED
    for old in models._RENAMED:
        with pytest.warns(FutureWarning):
            getattr(models, old)
