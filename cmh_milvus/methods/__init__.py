"""How codes are learned: one module a published method, found by name.

A module of this package, or an entry point of the group ``cmh_milvus.methods``, that defines one `Method` subclass is
a method. There is no registry to edit.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from cmh_milvus.errors import SettingsError

if TYPE_CHECKING:
    from cmh_milvus.methods.base import Method

ENTRY_POINT_GROUP = "cmh_milvus.methods"
DEFAULT_METHODS = {True: "duet", False: "canon"}  # with labels, without


def list_methods() -> list[str]:
    """Names of all methods, sorted: the package's own and those of installed plugins."""
    own = {module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"}
    return sorted(own | {point.name for point in entry_points(group=ENTRY_POINT_GROUP)})


def get_method(name: str) -> type[Method]:
    """The method class of a name.

    Args:
        name: One of `list_methods()`.

    Raises:
        SettingsError: There is no method of that name, or the plugin that has it cannot be loaded.
    """
    from cmh_milvus.methods.base import Method

    if name not in list_methods():
        raise SettingsError(f"there is no method {name!r}; the methods are {', '.join(list_methods())}")
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in plugins:
        try:
            plugin: type[Method] = plugins[name].load()
        except Exception as error:
            raise SettingsError(
                f"the method {name!r} of an installed plugin cannot be loaded ({plugins[name].value}: {error}): mend "
                "the plugin, or uninstall it"
            ) from error
        return plugin
    module = importlib.import_module(f"{__name__}.{name}")
    (method,) = (
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Method) and member.__module__ == module.__name__
    )
    return method


def make_config(method: type[Method], settings: Mapping[str, Any]) -> Any:
    """The method's `Config` with some values changed.

    Args:
        method: A method class.
        settings: Values by field name; strings are converted to the field's type (the command line gives strings).

    Raises:
        SettingsError: A name is not a field of the config, or a value is not of its type or beyond its bounds.
    """
    from cmh_milvus.methods.base import Bounds

    defaults = dataclasses.asdict(method.Config())
    types = typing.get_type_hints(method.Config, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in defaults:
            raise SettingsError(f"method {method.name} has no setting {key!r}; its settings are {', '.join(defaults)}")
        kind: type[Any] = type(defaults[key])
        try:
            values[key] = _truth(value) if kind is bool else kind(value)
            if kind is int and not isinstance(value, str) and values[key] != value:
                raise ValueError(value)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"setting {key} of method {method.name} is {kind.__name__}, got {value!r}") from error
        said = getattr(types[key], "__metadata__", ())
        bounds = next((one for one in said if isinstance(one, Bounds)), Bounds())
        if kind in (int, float) and not bounds.allow(values[key]):
            raise SettingsError(f"setting {key} of method {method.name} is {bounds}, got {value!r}")
    config = method.Config(**values)
    if not method.closed_form and config.batch_size < 2:
        raise SettingsError(f"batch_size is at least 2, got {config.batch_size}: a batch is compared within itself")
    return config


def _truth(value: Any) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str(value).lower() not in known:
        raise ValueError(value)
    return known[str(value).lower()]
