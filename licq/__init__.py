"""Post-training quantization of learned image codecs: integer-exact, rate-distortion-optimized.

    import licq

    qmodel = licq.quantize(model, images, lmbda=0.0067)
    licq.evaluate(qmodel, "kodak").mean()
    qmodel.save("m.safetensors")
    codec = licq.Codec.load("m.safetensors")
    data = codec.encode(pixels)

`licq.__all__` is the public interface; other modules may change from one version to the next.

    quantize, PtqConfig, QuantConfig, list_presets    a method, and what it does to a codec
    QuantModel, Codec                                 the quantized network, and the files it writes
    evaluate, sample_crops                            images in
    register_model, list_models                       codecs by name, and how to add one
    InputError, InputWarning                          what a caller can mend

Importing this package takes a few milliseconds: torch is imported with the first name that needs it.
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
    from licq.reconstruction.config import PtqConfig
    from licq.reconstruction.preset_files import list_presets
    from licq.support.errors import InputError, InputWarning
    from licq.support.version import __version__

# In a wheel quant/, models/ ... lie in this folder. In a checkout they lie beside it, and this package looks
# there too.
_CHECKOUT = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "quant").is_dir() and (_CHECKOUT / "quant").is_dir():
    __path__.append(str(_CHECKOUT))

_MODULE_OF = {
    "Codec": "licq.codec.api",
    "InputError": "licq.support.errors",
    "InputWarning": "licq.support.errors",
    "PtqConfig": "licq.reconstruction.config",
    "QuantConfig": "licq.quant.config",
    "QuantModel": "licq.quant.model",
    "__version__": "licq.support.version",
    "evaluate": "licq.evaluation.evaluate",
    "list_models": "licq.models.registry",
    "list_presets": "licq.reconstruction.preset_files",
    "quantize": "licq.reconstruction.api",
    "register_model": "licq.models.registry",
    "sample_crops": "licq.data.calibration",
}

# Written out, so that type checkers see it.
__all__ = [
    "Codec",
    "InputError",
    "InputWarning",
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
    """Import a name of `__all__` when it is asked for first."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'licq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What `dir(licq)` and completion in a shell show."""
    return sorted({*globals(), *__all__})
