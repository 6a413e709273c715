"""The architectures by name: `@register_model("name")` above a class or function is the whole plug-in.

A plug-in of the user's own is a Python file with that decorator; its path is taken wherever a name is
(`--arch examples/bls2017.py`), which runs the file once.

A codec is any `nn.Module` whose forward maps an image (B, 3, H, W) in 0..1, H and W multiples of
`Architecture.multiple`, to `{"x_hat": (B, 3, H, W), "likelihoods": {"y": ..., "z": ...}}`.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from licq.support.errors import InputError

# The weight of the distortion in J = R + lambda * D, per quality, as CompressAI trains (its documentation,
# "Training"): D = 255^2 * mse on images in 0..1, or D = 1 - MS-SSIM.
LAMBDAS = {
    "mse": {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130, 5: 0.0250, 6: 0.0483, 7: 0.0932, 8: 0.1800},
    "ms-ssim": {1: 2.40, 2: 4.58, 3: 8.73, 4: 16.64, 5: 31.73, 6: 60.50, 7: 115.37, 8: 220.00},
}

_BUILT_IN = (
    "licq.models.compressai_models",
    "licq.models.cheng2019",
    "licq.models.chen2021",
    "licq.models.qvrf",
    "licq.models.vbr",
    "licq.models.tic",
    "licq.models.lu2022",
)
_REGISTRY: dict[str, "Architecture"] = {}
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
        title, paper: of the publication.
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
        known = _REGISTRY.get(name)
        if known is not None and _identity(known.factory) != _identity(factory):
            raise ValueError(f"the name {name!r} is already taken by {known.factory!r}")
        _REGISTRY[name] = Architecture(
            name=name, factory=factory, official=official, configurations=configurations, **fields
        )
        return factory

    return register if factory is None else register(factory)


def list_models() -> list[str]:
    """All names, sorted."""
    _import_built_in()
    return sorted(_REGISTRY)


def get_architecture(name: str) -> Architecture:
    """The architecture of that name, or the one that the Python file of that path registers (the file is run,
    once).

    Raises:
        InputError: there is none (the message lists the names), or the file is not a plug-in.
    """
    _import_built_in()
    if name.endswith(".py"):
        return _REGISTRY[_run_plugin(name)]
    if name not in _REGISTRY:
        raise InputError(f"unknown architecture {name!r}; choose --arch from {', '.join(list_models())}")
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
            f"no plug-in at {path}; give an existing file or one of {', '.join(list_models())} with --arch"
        )
    module_name = f"licq_plugin_{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    before = dict(_REGISTRY)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody else's file raises
        _forget(module_name, before)
        raise InputError(
            f"the plug-in {path} fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    names = [name for name, architecture in _REGISTRY.items() if before.get(name) is not architecture]
    if len(names) != 1:
        _forget(module_name, before)
        found = f"registers {', '.join(names)}" if names else "registers no architecture"
        raise InputError(f"the plug-in {path} {found}; a plug-in has exactly one class under @register_model")
    _PLUGINS[file] = names[0]
    return names[0]


def _forget(module_name: str, registry: Mapping[str, "Architecture"]) -> None:
    """Undo what a plug-in that is refused has done here."""
    del sys.modules[module_name]
    _REGISTRY.clear()
    _REGISTRY.update(registry)


def _import_built_in() -> None:
    """Import the project's own architectures, which register themselves; lazily, so that they can import this
    file."""
    for module in _BUILT_IN:
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


def _identity(factory: Callable[..., nn.Module]) -> tuple[str, str]:
    """Where it is written: a plug-in's file may also have been imported under another name."""
    file = getattr(sys.modules.get(factory.__module__), "__file__", None)
    return str(file or factory.__module__), factory.__qualname__
