"""Files of every architecture decode to the pixels of the quantized network; whatever else is in a file is
told in one line."""

import random
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from compressai.models import FactorizedPrior, JointAutoregressiveHierarchicalPriors, MeanScaleHyperprior
from scipy.stats import norm

from benchmarks.fuzz import hostile
from licq.codec.api import Codec
from licq.codec.container import MAGIC, MAX_GAIN, Container
from licq.codec.fingerprint import of_integers
from licq.codec.model_tables import coder_of
from licq.codec.plan import Plan
from licq.data.padding import pad_to_multiple
from licq.evaluation.evaluate import evaluate
from licq.integer.lowering import lower
from licq.models.registry import create_model, list_models
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.support.errors import InputError
from tests.frozen_codecs import frozen
from tests.tiny_codecs import SIZES, images

DIGEST = bytes(range(32))
QUICK = ("balle2018", "minnen2018", "lu2022")


def codec_of(name: str) -> Codec:
    return Codec(frozen(name), DIGEST, threads=1)


def pixels(height: int, width: int, seed: int = 5) -> torch.Tensor:
    full = images(1, 64 * -(-height // 64), 64 * -(-width // 64), seed)[0, :, :height, :width]
    return (full * 255).round().to(torch.uint8)


def simulated(name: str, image: torch.Tensor) -> torch.Tensor:
    padded, unpad = pad_to_multiple(image[None].float() / 255)
    with torch.no_grad():
        x_hat = frozen(name)(padded)["x_hat"]
    return torch.nn.functional.pad((x_hat * 255).round(), unpad)[0].to(torch.uint8)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SIZES]
)
def test_files_decode_to_the_pixels_of_the_quantized_network(name):
    codec = codec_of(name)
    for height, width in ((64, 64), (100, 150)):
        image = pixels(height, width)
        data = codec.encode(image)
        decoded = codec_of(name).decode(data)
        assert decoded.dtype == torch.uint8 and torch.equal(decoded, simulated(name, image))


def test_a_codec_that_pads_at_some_sizes_only_has_files_at_all():
    """tic's windows do not fit into the small image that its context model runs on; there its forward has
    steps that pad."""
    torch.manual_seed(0)
    model = QuantModel(create_model("tic", **{**SIZES["tic"], "window_size": 8}).eval(), QuantConfig())
    model.observe(images(2).split(1))
    model.freeze()
    assert (
        len(
            {len(lower(model, 64, width).operations) for width in (64, 128)}
            | {len(lower(model, 128, 128).operations)}
        )
        > 1
    )
    for height, width in ((128, 128), (64, 192)):
        image = pixels(height, width)
        codec = Codec(model, DIGEST, threads=1)
        assert torch.equal(codec.decode(codec.encode(image)), codec.inspect(image)["pixels"])


@pytest.mark.parametrize(
    "name", ["minnen2018", "balle2018", pytest.param("chen2021", marks=pytest.mark.slow)]
)
def test_rows_made_in_small_pieces_give_the_same_file(name, monkeypatch):
    codec, image = codec_of(name), pixels(64, 128)
    data = codec.encode(image)
    monkeypatch.setattr("licq.codec.coder._BLOCK", 7)
    monkeypatch.setattr("licq.codec.coder._BLOCK_OF_MIXTURES", 7)
    assert codec.encode(image) == data
    assert torch.equal(codec.decode(data), simulated(name, image))


@pytest.mark.parametrize("name", ["balle2018", "minnen2018"])
def test_the_reference_reads_and_writes_the_files_of_the_kernels(name, monkeypatch):
    image = pixels(64, 128)
    data = codec_of(name).encode(image)
    monkeypatch.setattr("licq.integer.execution.usable", lambda: False)
    monkeypatch.setattr("licq.codec.rans.compiled", lambda: None)
    assert codec_of(name).encode(image) == data
    assert torch.equal(codec_of(name).decode(data), simulated(name, image))


@pytest.mark.parametrize("image", [torch.rand(3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)])
def test_what_is_no_8_bit_rgb_image_is_not_encoded(image):
    with pytest.raises(InputError, match="give uint8"):
        codec_of("balle2018").encode(image)


def test_every_architecture_is_here():
    assert {name for name in list_models() if name in SIZES} == set(SIZES)


class TwoRoundings(MeanScaleHyperprior):
    """Its synthesis reads round(y) and round(y - mean) + mean, or, where `reads_latent`, y as it is."""

    reads_latent = False

    def forward(self, x):
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y))
        scales, means = self.h_s(z_hat).chunk(2, 1)
        y_hat, y_likelihoods = self.gaussian_conditional(y, scales, means=means)
        other = y if self.reads_latent else self.gaussian_conditional.quantize(y, "dequantize")
        return {"x_hat": self.g_s(y_hat + other), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}


@pytest.mark.parametrize("reads_latent", [False, True])
def test_a_codec_whose_forward_has_no_bitstream_says_so(reads_latent, tmp_path):
    """It writes no file, which no decoder could read."""
    torch.manual_seed(0)
    network = TwoRoundings(6, 8).eval()
    network.reads_latent = reads_latent
    model = QuantModel(network, QuantConfig())
    model.observe(images(2).split(1))
    model.freeze()
    codec = Codec(model, DIGEST, threads=1)
    with pytest.raises(InputError, match="estimated rates"):
        codec.encode(pixels(64, 64))
    if reads_latent:  # verify compares what its network computes all the same
        job = {"batch": 1, "device": "cpu", "base": True}
        assert of_integers(codec, pixels(64, 64), tmp_path / "0.licq", job).keys() == {
            "symbols",
            "indexes",
            "pixels",
        }


@pytest.mark.parametrize("name", ["qvrf-balle2018", "balle2018-vbr"])
def test_a_file_says_its_rate(name):
    codec = codec_of(name)
    image = pixels(128, 192)
    files = {level: codec.encode(image, level) for level in (1, 5.5, 8)}
    assert len(files[1]) < len(files[5.5]) < len(files[8])
    for level, data in files.items():
        gain = Container.from_bytes(data).gain / 2**16
        assert gain == pytest.approx(frozen(name).model.gain(level), rel=1e-4)
        decoded = codec.decode(data)
        frozen(name).model.set_factor(gain)
        assert torch.equal(decoded, simulated(name, image))
    frozen(name).model.set_level(1)


def test_an_evaluation_with_files_is_at_the_gain_that_files_state():
    """A gain that lies between two of theirs gave other symbols in the network than in the file."""
    codec = codec_of("qvrf-balle2018")
    codec.model.model.set_factor(1.37 + 0.49 / 2**16)
    x = images(1, 64, 64, 5)[0]
    before = float(codec.model.model.rate)
    report = evaluate(codec.model, [x], codec=codec, progress=False)
    assert (
        report.bpp_source == "bitstream"
        and float(codec.model.model.rate) == round(before * 2**16) / 2**16 != before
    )


@pytest.mark.parametrize("name", ["qvrf-balle2018", "balle2018-vbr", "minnen2018-vbr"])
def test_every_rate_that_is_accepted_can_be_decoded(name):
    codec, image = codec_of(name), pixels(64, 64)
    highest = frozen(name).model.level_of(MAX_GAIN)
    for level in (0.01, 0.999 * highest):
        data = codec.encode(image, level)
        frozen(name).model.set_level(level)
        codec.settle_rate()
        assert torch.equal(codec.decode(data), codec.inspect(image)["pixels"])
    frozen(name).model.set_level(1)
    for level in (60, 100, 1000, 1e9, 0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="from 1 to 8"):
            codec.encode(image, level)
    content = Container.from_bytes(data)
    for gain in (MAX_GAIN * 2**16 + 1, 2**35 - 1):
        assert "damaged" in refused(codec, replace(content, gain=gain).to_bytes())


@pytest.mark.parametrize("kind", [FactorizedPrior, JointAutoregressiveHierarchicalPriors])
def test_codecs_of_other_classes_have_files_too(kind):
    """A codec without hyperprior, and CompressAI's own class, which estimates the rate of another rounding
    than it uses."""
    torch.manual_seed(0)
    network = kind(6, 8).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4 and not name.startswith("entropy_bottleneck"):
                parameter.mul_(2)
    model = QuantModel(network, QuantConfig())
    model.observe(images(2).split(1))
    model.freeze()
    image = pixels(64, 128)
    codec = Codec(model, DIGEST, threads=1)
    with torch.no_grad():
        expected = (model(image[None].float() / 255)["x_hat"][0] * 255).round().to(torch.uint8)
    assert torch.equal(codec.decode(codec.encode(image)), expected)


def test_length_is_that_of_the_density_of_what_is_coded():
    """Against SciPy, on latents with few outliers: the tables, the coder and its last bytes cost less than
    0.5 % and 16 bytes."""
    model = frozen("minnen2018")
    plan = Plan(lower(model, 256, 256), None, 1)
    latents = plan.encode(pixels(256, 256)[None].numpy())
    unit = 2.0**-model.config.boundary_bits
    symbols, scales, means = (latents[1][name].astype(float) for name in ("symbols", "scales", "means"))
    scales, means = np.maximum(scales * unit, 0.11), means * unit
    likelihood = norm.cdf((symbols + 0.5 - means) / scales) - norm.cdf((symbols - 0.5 - means) / scales)
    common = np.abs(symbols - means) < 4 * scales + 0.5
    exact = -np.log2(np.maximum(likelihood[common], 1e-30)).sum() / 8

    coder = coder_of(model)
    rows = coder.tables[plan.latents[1].node].of(latents[1]["scales"], latents[1]["means"])
    spent = 0.0
    for row, base, symbol, counts in zip(rows.rows, rows.base, symbols.flatten(), common.flatten()):
        if counts:
            cdf, index = rows.table.row(row), int(symbol - base - rows.table.offsets[row])
            spent -= np.log2((cdf[index + 1] - cdf[index]) / 2**16) / 8
    assert abs(spent / exact - 1) < 0.005
    outside = int((~common).sum())
    stream = coder.encode(plan, pixels(256, 256)[None].numpy())
    z = len(stream) - spent
    assert -0.01 * spent < z < 16 + 6 * outside + 0.1 * spent


# ----------------------------------------------------------------------------------------------------- damage


def written(name: str = "balle2018") -> bytes:
    return codec_of(name).encode(pixels(100, 150))


def test_content_of_the_container():
    content = Container(b"abcd", 70000, 3, 2500, (b"", b"xyz" * 100))
    assert Container.from_bytes(content.to_bytes()) == content
    assert len(Container(b"abcd", 768, 512, 0, (b"x" * 6000,)).to_bytes()) - 6000 == 15
    data = written()
    assert data[:2] == MAGIC and Container.from_bytes(data).model == DIGEST[:4]


def refused(codec: Codec, data: bytes) -> str:
    with pytest.raises(InputError) as caught:
        codec.decode(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_shorter_file_and_every_flipped_bit_is_noticed():
    codec, data = codec_of("balle2018"), written()
    for length in range(len(data)):
        refused(codec, data[:length])
    refused(codec, data + b"\0")
    for index in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[index] ^= 1 << bit
            refused(codec, bytes(changed))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (64, 5), (64, 80)])
def test_grey_images_and_small_ones(height, width):
    codec = codec_of("balle2018")
    colour = pixels(height, width)
    data = codec.encode(colour)
    assert data[2] == 2 and torch.equal(codec.decode(data), simulated("balle2018", colour))
    grey = colour[:1]
    data, equal = codec.encode(grey), codec.encode(grey.expand(3, -1, -1))
    # one bit in the third byte, and so another checksum
    assert data[2] == equal[2] + 8 and len(data) == len(equal) and data[13:] == equal[13:]
    decoded, channels = codec.decode(data), codec.decode(equal).long()
    assert decoded.dtype == torch.uint8 and decoded.shape == grey.shape
    assert torch.equal(decoded[0].long(), (channels.double().mean(0)).round().long())
    assert not Container.from_bytes(equal).grey and Container.from_bytes(data).grey


def test_another_model_and_another_format_are_told():
    data = written()
    assert "another model" in refused(Codec(frozen("balle2018"), b"other model"), data)
    assert "no .licq file" in refused(codec_of("balle2018"), b"\x89PNG\r\n")
    assert "version" in refused(codec_of("balle2018"), data[:2] + b"\7" + data[3:])


@pytest.mark.parametrize(
    ("name", "budget"),
    [("balle2018", 150), ("minnen2018", 40), pytest.param("lu2022", 100, marks=pytest.mark.slow)],
)
def test_hostile_streams_with_right_checksums_decode_or_are_refused(name, budget):
    """Random, truncated, spliced and repeated streams: an image of the stated size or one line, and no
    crash."""
    draw = random.Random(0)
    codec = codec_of(name)
    good = Container.from_bytes(codec.encode(pixels(64, 64)))
    for _ in range(budget):
        data = hostile(good, draw)
        stated = Container.from_bytes(data)
        try:
            assert codec.decode(data).shape == (3, stated.height, stated.width)
        except InputError as error:
            assert "\n" not in str(error)


def test_a_hostile_size_is_refused_before_anything_is_allocated():
    head = Container(DIGEST[:4], 2**17, 2**17, 0, (b"",))
    assert "damaged" in refused(codec_of("balle2018"), head.to_bytes())
    for width, height in (
        (2**26, 1),
        (1, 2**26),
        (2**20 + 1, 1),
    ):  # 64 times as many pixels when they are padded
        assert "too large" in refused(
            codec_of("balle2018"), Container(DIGEST[:4], width, height, 0, (b"",)).to_bytes()
        )
        with pytest.raises(InputError, match="too large"):
            codec_of("balle2018").encode(torch.empty(1, dtype=torch.uint8).expand(3, height, width))
    assert zlib.crc32(b"") == 0  # the checksum of an empty stream is that of the header alone
