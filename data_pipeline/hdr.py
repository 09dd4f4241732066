"""High dynamic range and wide gamut to what a screen of BT.709 shows, so that such clips look like all the others.

    signal --EOTF--> light --BT.2020 to BT.709--> light --tone mapping--> light <= 1 --inverse BT.1886--> signal

Light is in units of reference white, 203 cd/m2 (ITU-R BT.2408), so that a white page in an HDR clip is nearly as white
as in another. PQ is absolute (SMPTE ST 2084); HLG is shown on a screen of 1000 cd/m2 (ITU-R BT.2100, gamma 1.2). The
tone curve leaves light below 0.3 alone, bends smoothly above it and reaches 1 at 1000 cd/m2, which few masters pass;
brighter light is clipped. It is taken of the largest of R, G and B and scales all three, so hues stay. It is the
"mobius" curve of ffmpeg's tonemap filter; the whole is `zscale=t=linear:npl=203, zscale=p=bt709,
tonemap=mobius:peak=4.926:desat=0, zscale=t=bt709`, which the tests compare it with (that chain bends HLG's R, G
and B one by one, though, where BT.2100 takes their luma).
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Transfer = Literal["pq", "hlg", "sdr"]
Float32Array = npt.NDArray[np.float32]

WHITE, BRIGHTEST = 203.0, 1000.0  # cd/m2
PEAK = BRIGHTEST / WHITE
KNEE = 0.3
GAMMA = 2.4  # of the screen that SDR is made for: ITU-R BT.1886
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
TO_709 = np.array(  # of light in BT.2020 primaries, both with D65 white
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)


def to_sdr(rgb_HWC: npt.NDArray[np.uint16], transfer: Transfer) -> npt.NDArray[np.uint8]:
    """BT.2020 signals (full range, 16 bits) as BT.709 signals of 8 bits; "sdr" only brings the gamut home."""
    light = linear_table(transfer)[rgb_HWC]
    if transfer == "hlg":
        light *= (light @ LUMA_2020)[..., None] ** np.float32(0.2) * np.float32(PEAK)
    light = light @ TO_709.T
    if transfer != "sdr":
        brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
        light *= mobius(brightest) / brightest
    signal: npt.NDArray[np.uint8] = np.rint(light.clip(0, 1) ** np.float32(1 / GAMMA) * 255).astype(np.uint8)
    return signal


@lru_cache(maxsize=3)
def linear_table(transfer: Transfer) -> Float32Array:
    """(65536,) light of every 16-bit signal: in units of white for PQ and SDR, of the scene (0..1) for HLG."""
    signal = np.arange(65536) / 65535
    if transfer == "pq":
        light = pq_light(signal) / WHITE
    else:
        light = hlg_scene(signal) if transfer == "hlg" else signal**GAMMA
    table: Float32Array = light.astype(np.float32)
    return table


def pq_light(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """cd/m2 of a PQ signal in 0..1: ST 2084, equation 4.1."""
    root = signal ** (1 / 78.84375)
    light: npt.NDArray[np.float64] = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (
        1 / 0.1593017578125
    )
    return 10_000 * light


def hlg_scene(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Light of the scene in 0..1 of an HLG signal: the inverse OETF of BT.2100, table 5."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def mobius(light: Float32Array) -> Float32Array:
    """Light at or above 0 with the part above KNEE bent so that PEAK becomes 1."""
    a = -(KNEE**2) * (PEAK - 1) / (KNEE**2 - 2 * KNEE + PEAK)
    b = (KNEE**2 - 2 * KNEE * PEAK + PEAK) / (PEAK - 1)
    scale = (b * b + 2 * b * KNEE + KNEE**2) / (b - a)
    return np.where(light <= KNEE, light, np.float32(scale) * (light + np.float32(a)) / (light + np.float32(b)))
