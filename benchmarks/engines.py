"""Inference engines that run an ONNX file on the CPU, in float or quantized to INT8.

Each is imported where it is used, because a comparison with one of them needs no other.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from licq.support.errors import InputError

Inputs = list[np.ndarray]
Run = Callable[[np.ndarray], np.ndarray]

# OpenVINO and NNCF report their import over the network where this package is installed.
sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))


def _has_attention(path: Path) -> bool:
    import onnx

    return any(node.op_type == "MatMul" for node in onnx.load(path).graph.node)


def run_onnxruntime(path: Path, _: Inputs, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # its idle threads would take the time of the next engine
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def run_onnxruntime_int8(path: Path, calibration: Inputs, threads: int) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.left, None)
            return None if x is None else {"x": x}

    # Without quant_pre_process: the file has its shapes already, and its constant folding makes the file of
    # lu2022 nine times larger, not faster.
    quantized = path.with_suffix(".int8.onnx")
    # Its fast kernel on x86 multiplies unsigned by signed integers. Without VNNI that saturates, unless the
    # weights have seven bits (reduce_range), which are as fast. Around attention, quantizing every operation
    # (its default) costs more than it saves.
    operations = ["Conv", "MatMul", "Gemm"] if _has_attention(path) else None
    quantize_static(
        path,
        quantized,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        op_types_to_quantize=operations,
    )
    return run_onnxruntime(quantized, calibration, threads)


def _run_openvino(model: Any, threads: int) -> Run:
    import openvino

    # not pinned: a pinned calling thread would keep its core while other engines run
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0]


def run_openvino(path: Path, _: Inputs, threads: int) -> Run:
    import openvino

    return _run_openvino(openvino.Core().read_model(path), threads)


def run_openvino_int8(path: Path, calibration: Inputs, threads: int) -> Run:
    import nncf
    import openvino

    # Some activations of these codecs have signs and some do not (MIXED). Weights have seven bits where eight
    # would saturate, as above.
    quantized = nncf.quantize(
        openvino.Core().read_model(path),
        nncf.Dataset(calibration),
        subset_size=len(calibration),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if _has_attention(path) else None,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
    )
    return _run_openvino(quantized, threads)


@dataclass(frozen=True)
class Peer:
    """An engine.

    Args:
        head: its heading in tables.
        packages: that it needs.
        prepare: (ONNX file, calibration inputs, threads) -> what runs the file.
    """

    head: str
    packages: tuple[str, ...]
    prepare: Callable[[Path, Inputs, int], Run]


PEERS = {
    "onnxruntime": Peer("ONNX Runtime", ("onnxruntime",), run_onnxruntime),
    "onnxruntime-int8": Peer("ONNX Runtime INT8", ("onnxruntime",), run_onnxruntime_int8),
    "openvino": Peer("OpenVINO", ("openvino",), run_openvino),
    "openvino-int8": Peer("OpenVINO INT8", ("openvino", "nncf"), run_openvino_int8),
}


def require_packages(peers: list[str]) -> None:
    """Raises InputError where a package is missing: before minutes of work, not after."""
    packages = dict.fromkeys(
        package for peer in peers for package in ("onnx", "onnxscript", *PEERS[peer].packages)
    )
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"not installed: {', '.join(missing)}; pip install .[bench] (or `peers` without names: PyTorch "
            "and licq only)"
        )
