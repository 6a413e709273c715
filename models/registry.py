"""The architectures by name: `@register_model("name")` above a class or function is the whole plug-in.

A user's own codec is a Python file with that decorator, whose path is taken wherever a name is
(`--arch examples/bls2017.py`), or an installed package that names its module in its metadata:

    [project.entry-points."licq.models"]
    mine = "my_package.codec"

A module is imported when its architecture is asked for; this file imports no torch.

A codec is any `nn.Module` whose forward maps an image (B, 3, H, W) in 0..1, H and W multiples of
`Architecture.multiple`, to `{"x_hat": (B, 3, H, W), "likelihoods": {"y": ..., "z": ...}}`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from licq.models.plugin_path import find_beside
from licq.support.errors import InputError, InputWarning

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import Tensor, nn

# The weight of the distortion in J = R + lambda * D, per quality, as CompressAI trains (its documentation,
# "Training"): D = 255^2 * mse on images in 0..1, or D = 1 - MS-SSIM.
LAMBDAS = {
    "mse": {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130, 5: 0.0250, 6: 0.0483, 7: 0.0932, 8: 0.1800},
    "ms-ssim": {1: 2.40, 2: 4.58, 3: 8.73, 4: 16.64, 5: 31.73, 6: 60.50, 7: 115.37, 8: 220.00},
}

ENTRY_POINTS = "licq.models"  # the group in which installed packages name theirs

# By module, so that one of them can be listed and checked without importing torch.
_BUILT_IN = {
    "licq.models.compressai_models": (
        "balle2018",
        "minnen2018",
        "minnen2018-mean",
        "cheng2020",
        "cheng2020-anchor",
    ),
    "licq.models.cheng2019": ("cheng2019",),
    "licq.models.chen2021": ("chen2021",),
    "licq.models.qvrf": ("qvrf-balle2018", "qvrf-minnen2018", "qvrf-cheng2020"),
    "licq.models.vbr": ("balle2018-vbr", "minnen2018-mean-vbr", "minnen2018-vbr"),
    "licq.models.tic": ("tic",),
    "licq.models.lu2022": ("lu2022",),
}
_MODULE_OF = {name: module for module, names in _BUILT_IN.items() for name in names}
_REGISTRY: dict[str, Architecture] = {}
_PLUGINS: dict[Path, str] = {}  # files that have been run, and the name that each registered


@dataclass(frozen=True)
class Architecture:
    """What the project knows about one network family.

    Args:
        name: what `arch` is everywhere.
        factory: makes the network; called with widths (and depths) as keyword arguments.
        official: quality -> the factory's arguments for the published model of that quality; {} for its
            defaults.
        configurations: name -> the factory's arguments for a small size; every architecture has "reference".
        title: of the publication.
        paper: its number on arXiv, or its address.
        multiple: the sides of an input image are multiples of it.
        lambdas: metric ("mse", "ms-ssim") -> quality -> lambda.
        infer: state_dict -> the factory's arguments, from the shapes of tensors; it may raise KeyError where
            tensors are absent. None: the arguments are searched for among `official` and `configurations`.
        adapt: a state_dict of the publication's files -> the factory's, where names or contents differ. It
            leaves a state_dict of the factory's as it is.
        companions: prefix -> name of a second file that holds the tensors with this prefix, beside a file
            without them; {stem} and {suffix} stand for those of the first file.
        variable: one network has all qualities; its method `set_level(quality)` chooses one
            (`models.qvrf.VariableRate`).
        zoo: the model's name in `compressai.zoo`, where it has one.
        loader: for codecs whose weights are not one state_dict: (path of the checkpoint, quality) -> the
            network. One path serves all qualities. It raises InputError.
    """

    name: str
    factory: Callable[..., nn.Module]
    official: Mapping[int, Mapping[str, Any]]
    configurations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    title: str = ""
    paper: str = ""
    multiple: int = 64
    lambdas: Mapping[str, Mapping[int, float]] = field(default_factory=lambda: LAMBDAS)
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None
    adapt: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    companions: Mapping[str, str] = field(default_factory=dict)
    variable: bool = False
    zoo: str | None = None
    loader: Callable[[Path, int | None], nn.Module] | None = None

    def sizes(self, quality: int | None = None, configuration: str | None = None) -> dict[str, Any]:
        """The factory's arguments, complete.

        Args:
            quality: whose; None: the lowest.
            configuration: instead of a quality, the name of a small size.

        Raises:
            InputError: there is no such quality or configuration.
        """
        if quality is not None:
            self.check_quality(quality)
        if configuration is not None:
            if configuration not in self.configurations:
                known = ", ".join(sorted(self.configurations)) or "none"
                raise InputError(f"{self.name} has no configuration {configuration!r}; it has: {known}")
            return self.complete(self.configurations[configuration])
        return self.complete(self.official[min(self.official) if quality is None else quality])

    def complete(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The factory's arguments with its defaults, and lists as tuples, so that two can be compared."""
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(self.factory).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        merged = {**defaults, **kwargs}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in merged.items()}

    def check_quality(self, quality: int) -> None:
        """Raises InputError where the architecture has no such quality."""
        if quality not in self.official:
            first, last = min(self.official), max(self.official)
            raise InputError(
                f"{self.name} has no quality {quality!r}; choose `quality` from {first} to {last}"
            )

    def lambda_for(self, quality: int, metric: str = "mse") -> float:
        """The lambda of J = R + lambda * D that models of a quality are trained with.

        Args:
            metric: "mse" (D is the squared error on 0..255) or "ms-ssim" (D is 1 - MS-SSIM).

        Raises:
            InputError: there is no such quality or metric.
        """
        self.check_quality(quality)
        if metric not in self.lambdas:
            raise InputError(f"unknown metric {metric!r}; choose from {', '.join(self.lambdas)}")
        return self.lambdas[metric][quality]


def register_model(
    name: str,
    factory: Callable[..., nn.Module] | None = None,
    *,
    official: Mapping[int, Mapping[str, Any]],
    configurations: Mapping[str, Mapping[str, Any]],
    **fields: Any,
) -> Callable[..., Any]:
    """Make a codec known to licq by a name, as the decorator of its class or of a function that makes it.

        @licq.register_model("mine", official={1: {"N": 128}}, configurations={"reference": {"N": 48}})
        class Mine(nn.Module):
            def __init__(self, N: int = 128): ...
            def forward(self, x): ...    # (B, 3, H, W) in 0..1 -> {"x_hat", "likelihoods": {"y", "z"}}

    The file with these lines is a plug-in: its path is taken wherever the name of an architecture is.

    Args:
        name: for `arch`.
        factory: makes the network; left out where this is used as a decorator.
        official: quality -> the factory's arguments for the published model of that quality.
        configurations: name -> the factory's arguments for a small size; every architecture has "reference".
        fields: other fields of `Architecture`, such as `multiple` (of the sides of an image, 64 by default),
            `lambdas`, or `infer` (arguments from a checkpoint's tensors).

    Raises:
        ValueError: another factory already has this name.
    """

    def register(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        _import_built_in(name)  # so that its name is taken
        known = _REGISTRY.get(name)
        if known is not None and _identity(known.factory) != _identity(factory):
            raise ValueError(f"the name {name!r} is already taken by {known.factory!r}")
        _REGISTRY[name] = Architecture(
            name=name, factory=factory, official=official, configurations=configurations, **fields
        )
        return factory

    return register if factory is None else register(factory)


def list_models() -> list[str]:
    """All names, sorted: the project's own, those of installed packages, and those of plug-ins that were run.

    Packages that name models in the entry point group "licq.models" are imported. One that cannot be imported
    is left out, with a warning that says why.
    """
    for entry in _installed():
        problem = _load_installed(entry)
        if problem is not None:
            warnings.warn(problem, InputWarning, stacklevel=2)
    return sorted({*_MODULE_OF, *_REGISTRY})


def get_architecture(name: str) -> Architecture:
    """The architecture of that name, or the one that the Python file of that path registers (the file is run,
    once).

    Raises:
        InputError: there is none (the message lists the names), the file is not a plug-in, or the installed
            package of that name cannot be imported.
    """
    if name.endswith(".py"):
        return _REGISTRY[_run_plugin(name)]
    _import_built_in(name)
    if name not in _REGISTRY:
        for entry in _installed():
            problem = _load_installed(entry) if entry.name == name else None
            if problem is not None:
                raise InputError(problem)
    if name not in _REGISTRY:
        known = list_models()  # imports the other packages, one of which may register it
        if name not in _REGISTRY:
            raise InputError(f"unknown architecture {name!r}; choose `arch` from {', '.join(known)}")
    return _REGISTRY[name]


def create_model(
    name: str, quality: int | None = None, configuration: str | None = None, **overrides: Any
) -> nn.Module:
    """A network with initial weights.

    Args:
        name: of an architecture, or the path of a plug-in.
        quality: whose published sizes it has; None: the lowest.
        configuration: instead of a quality, the name of a small size, such as "reference".
        overrides: arguments of the factory that are to be others.

    Raises:
        InputError: unknown name, quality, configuration or size argument.
    """
    architecture = get_architecture(name)
    kwargs = {**architecture.sizes(quality, configuration), **overrides}
    try:
        inspect.signature(architecture.factory).bind(**kwargs)
    except TypeError as error:
        raise InputError(f"{name}: {error}") from error
    return create_network(name, kwargs)


def create_network(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A network with initial weights from the factory's own arguments; `architecture_of` will know it."""
    architecture = get_architecture(name)
    model = architecture.factory(**architecture.complete(kwargs))
    return mark_architecture(model, architecture, kwargs)


def mark_architecture(model: nn.Module, architecture: Architecture, kwargs: Mapping[str, Any]) -> nn.Module:
    """Note in a network what it is, for `architecture_of`; copies of the network have the note too."""
    vars(model)["licq_architecture"] = (architecture.name, architecture.complete(kwargs))
    return model


def architecture_of(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """(name, the factory's arguments) of a network that licq has made; None of any other network."""
    return getattr(model, "licq_architecture", None)


def _run_plugin(path: str) -> str:
    """The name that the file registers."""
    file = Path(path).resolve()
    if file in _PLUGINS:
        return _PLUGINS[file]
    if not file.is_file():
        raise InputError(
            f"no plug-in at {path}; give an existing file or one of {', '.join(list_models())} as `arch`"
        )
    module_name = f"licq_plugin_{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    before = dict(_REGISTRY)
    sys.modules[module_name] = module
    undo = find_beside(file.parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody else's file raises
        undo()
        _forget(module_name, before)
        raise InputError(f"the plug-in {path} fails: {_one_line(error)}") from error
    names = [name for name in _REGISTRY if _is_news(name, before)]
    if len(names) != 1:
        undo()
        _forget(module_name, before)
        found = f"registers {', '.join(names)}" if names else "registers no architecture"
        raise InputError(f"the plug-in {path} {found}; a plug-in has exactly one class under @register_model")
    _PLUGINS[file] = names[0]
    return names[0]


def _is_news(name: str, before: Mapping[str, Architecture]) -> bool:
    """Whether a plug-in has registered it. It may also have imported modules of the project, which register
    theirs."""
    return name not in _MODULE_OF and before.get(name) is not _REGISTRY[name]


def _forget(module_name: str, before: Mapping[str, Architecture]) -> None:
    """Undo what a plug-in that is refused has done here."""
    del sys.modules[module_name]
    for name in [name for name in _REGISTRY if _is_news(name, before)]:
        del _REGISTRY[name]
    _REGISTRY.update(before)


@functools.cache
def _installed() -> tuple[EntryPoint, ...]:
    from importlib.metadata import entry_points  # here: it takes a third of the time of `import licq`

    return tuple(entry_points(group=ENTRY_POINTS))


@functools.cache
def _load_installed(entry: EntryPoint) -> str | None:
    """Import what an installed package names, once; the line that says why it cannot be, or None."""
    try:
        entry.load()
    except Exception as error:  # whatever somebody else's package raises
        package = entry.dist.name if entry.dist is not None else entry.value
        return (
            f"the codec {entry.name} of the installed package {package} cannot be imported: "
            f"{_one_line(error)}; mend or uninstall the package"
        )
    return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _import_built_in(name: str) -> None:
    """Import the module of the project that registers the name, where there is one; lazily, so that it can
    import this file."""
    module = _MODULE_OF.get(name)
    if module is not None and module not in sys.modules:
        importlib.import_module(module)


def _identity(factory: Callable[..., nn.Module]) -> tuple[str, str]:
    """Where it is written: a plug-in's file may also have been imported under another name."""
    file = getattr(sys.modules.get(factory.__module__), "__file__", None)
    return str(file or factory.__module__), factory.__qualname__
