"""Post-training quantization of learned image codecs: integer-exact, rate-distortion-optimized.

    import licq
    qmodel = licq.quantize(model, images, lmbda=0.0067)

Importing this package is fast: torch is imported with the first name that needs it.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from licq.codec.api import Codec
    from licq.data.calibration import sample_crops
    from licq.evaluation.evaluate import evaluate
    from licq.models.registry import list_models, register_model
    from licq.quant.config import QuantConfig
    from licq.quant.model import QuantModel
    from licq.reconstruction.api import quantize
    from licq.reconstruction.config import PtqConfig, list_presets
    from licq.support.errors import InputError
    from licq.support.version import __version__

# In a wheel quant/, models/ ... lie in this folder. In a checkout they lie beside it, and this package looks
# there too.
_CHECKOUT = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "quant").is_dir() and (_CHECKOUT / "quant").is_dir():
    __path__.append(str(_CHECKOUT))

_HOMES = {
    "Codec": "licq.codec.api",
    "InputError": "licq.support.errors",
    "PtqConfig": "licq.reconstruction.config",
    "QuantConfig": "licq.quant.config",
    "QuantModel": "licq.quant.model",
    "evaluate": "licq.evaluation.evaluate",
    "list_models": "licq.models.registry",
    "list_presets": "licq.reconstruction.config",
    "quantize": "licq.reconstruction.api",
    "register_model": "licq.models.registry",
    "sample_crops": "licq.data.calibration",
    "__version__": "licq.support.version",
}

__all__ = [
    "Codec",
    "InputError",
    "PtqConfig",
    "QuantConfig",
    "QuantModel",
    "__version__",
    "evaluate",
    "list_models",
    "list_presets",
    "quantize",
    "register_model",
    "sample_crops",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'licq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
