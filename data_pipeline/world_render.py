"""The pixels of the rendered world: signed distances on small patches, all frames of a clip at once.

Letters: T frames, H rows, W columns, P side of the square patch around an object, 3 red green blue.
A shape is a signed distance in units of its radius (negative inside), in its own turned coordinates.
"""

import math

import numpy as np
from numpy.typing import NDArray

from data_pipeline.world import BackgroundSpec, ClipSpec, ObjectSpec, pose

Floats = NDArray[np.float32]
REACH = 1.2  # no shape reaches further than this many radii from its centre
SHADE = 0.22  # brightness rises by this share from an object's left to its right: a turn shows on every shape


def render_clip(spec: ClipSpec) -> NDArray[np.uint8]:
    """The frames of a clip, uint8 (T, H, W, 3)."""
    ground_HW3 = _background(spec.background, spec.width, spec.height)
    scale = min(spec.width, spec.height) / 64
    radius = max((thing.radius * (1 + thing.travel * _resizes(thing)) for thing in spec.objects), default=0) * scale
    margin = 2 * math.ceil(REACH * radius + 2)
    padded_HW3 = np.pad(ground_HW3, ((margin, margin), (margin, margin), (0, 0)))
    frames_THW3 = np.repeat(padded_HW3[None], spec.frames, axis=0)
    for thing in spec.objects:
        _draw(frames_THW3, thing, spec, scale, margin)
    return np.ascontiguousarray(frames_THW3[:, margin:-margin, margin:-margin])


def _resizes(thing: ObjectSpec) -> bool:
    return thing.what.motion in ("growing", "shrinking")


def _draw(frames_THW3: NDArray[np.uint8], thing: ObjectSpec, spec: ClipSpec, scale: float, margin: int) -> None:
    """Lay one object over the padded frames, in place."""
    moments = [t / max(1, spec.frames - 1) for t in range(spec.frames)]
    poses = np.array([pose(thing, moment) for moment in moments], dtype=np.float32)
    x_T, y_T, radius_T, angle_T, visible_T = poses.T
    x_T = x_T * scale + (spec.width - 64 * scale) / 2 + margin - 0.5  # in pixels; a pixel's centre is a whole number
    y_T = y_T * scale + (spec.height - 64 * scale) / 2 + margin - 0.5
    half = math.ceil(REACH * float(radius_T.max()) * scale + 1)
    around_P = np.arange(-half, half + 1)
    row_TP = np.rint(y_T).astype(np.int64)[:, None] + around_P
    column_TP = np.rint(x_T).astype(np.int64)[:, None] + around_P
    pixel_T11 = (radius_T * scale)[:, None, None]
    dx_T1P = (column_TP - x_T[:, None]).astype(np.float32)[:, None, :] / pixel_T11
    dy_TP1 = (row_TP - y_T[:, None]).astype(np.float32)[:, :, None] / pixel_T11
    cos_T11, sin_T11 = np.cos(angle_T)[:, None, None], np.sin(angle_T)[:, None, None]
    u_TPP = cos_T11 * dx_T1P + sin_T11 * dy_TP1
    v_TPP = cos_T11 * dy_TP1 - sin_T11 * dx_T1P
    distance_TPP = SHAPES[thing.what.shape](u_TPP, v_TPP) * pixel_T11
    alpha_TPP = np.clip(0.5 - distance_TPP, 0, 1) * visible_T[:, None, None]
    colour_TPP3 = (1 + SHADE * u_TPP)[..., None] * np.array(thing.rgb, dtype=np.float32)
    where = (np.arange(spec.frames)[:, None, None], row_TP[:, :, None], column_TP[:, None, :])
    under_TPP3 = frames_THW3[where]
    mixed_TPP3 = under_TPP3 + alpha_TPP[..., None] * (colour_TPP3 - under_TPP3)
    frames_THW3[where] = np.clip(mixed_TPP3 + 0.5, 0, 255).astype(np.uint8)


def _background(ground: BackgroundSpec, width: int, height: int) -> NDArray[np.uint8]:
    scale = min(width, height) / 64
    x_1W, y_H1 = np.arange(width, dtype=np.float32)[None] / scale, np.arange(height, dtype=np.float32)[:, None] / scale
    along_HW = math.cos(ground.angle) * x_1W + math.sin(ground.angle) * y_H1
    across_HW = math.cos(ground.angle) * y_H1 - math.sin(ground.angle) * x_1W
    step = 2 * math.pi / ground.period
    match ground.kind:
        case "stripes":
            level_HW = _steep(np.sin(step * along_HW + 2 * math.pi * ground.phase))
        case "checks":
            level_HW = _steep(np.sin(step * along_HW + 2 * math.pi * ground.phase) * np.sin(step * across_HW) * 2)
        case "gradient":
            level_HW = (along_HW - along_HW.min()) / (along_HW.max() - along_HW.min())
        case _:
            level_HW = _smooth_noise(ground.noise, width, height)
    dark_3, light_3 = np.array(ground.dark, dtype=np.float32), np.array(ground.light, dtype=np.float32)
    return (dark_3 + level_HW[..., None] * (light_3 - dark_3) + 0.5).astype(np.uint8)


def _steep(wave_HW: Floats) -> Floats:
    """A wave in [-1, 1] as bands of 0 and 1 with soft edges."""
    return _exactly(np.clip(0.5 + 2.5 * wave_HW, 0, 1))


def _smooth_noise(values: tuple[float, ...], width: int, height: int) -> Floats:
    """A 5 x 5 lattice of values in [0, 1), smoothly interpolated over the canvas."""
    lattice = np.array(values, dtype=np.float32).reshape(5, 5)
    return _exactly(_weights(height) @ lattice @ _weights(width).T)


def _weights(size: int) -> Floats:
    """(size, 5): how much every lattice line counts at every pixel, by cosine interpolation."""
    place = np.linspace(0, 4, size, dtype=np.float32)[:, None]
    nearness = np.clip(1 - np.abs(place - np.arange(5, dtype=np.float32)), 0, 1)
    return _exactly(0.5 - 0.5 * np.cos(math.pi * nearness))


def _exactly(values: NDArray[np.floating]) -> Floats:
    """`values` in float32, which they are already unless a constant widened them."""
    return values.astype(np.float32, copy=False)


def _square(u: Floats, v: Floats) -> Floats:
    return _exactly(np.maximum(np.abs(u), np.abs(v)) - np.float32(0.8))


def _triangle(u: Floats, v: Floats) -> Floats:
    """Equilateral, circumradius 1.15, one corner up."""
    slope = np.float32(math.sqrt(3) / 2)
    return _exactly(np.maximum(v, slope * np.abs(u) - np.float32(0.5) * v) - np.float32(0.575))


def _cross(u: Floats, v: Floats) -> Floats:
    """A plus sign of two bars."""
    a, b = np.abs(u), np.abs(v)
    long, wide = np.float32(1.05), np.float32(0.33)
    return _exactly(np.minimum(np.maximum(a - long, b - wide), np.maximum(a - wide, b - long)))


def _star(u: Floats, v: Floats) -> Floats:
    """Five points: each tenth of the plane is folded onto one edge from a tip to an inner corner."""
    tip, inner, fold = 1.15, 0.46, math.pi / 5
    angle = np.abs((np.arctan2(u, -v) + np.float32(fold)) % np.float32(2 * fold) - np.float32(fold))
    length = np.sqrt(u * u + v * v)
    corner_x, corner_y = inner * math.cos(fold), inner * math.sin(fold)
    edge = math.hypot(corner_x - tip, corner_y)
    normal_x, normal_y = corner_y / edge, (tip - corner_x) / edge
    along = np.float32(normal_x) * np.cos(angle) + np.float32(normal_y) * np.sin(angle)
    return _exactly(length * along - np.float32(normal_x * tip))


def _heart(u: Floats, v: Floats) -> Floats:
    """A square standing on its corner, and a disc on each of its upper sides."""
    side, root = np.float32(0.62), np.float32(math.sqrt(0.5))
    low = v - np.float32(0.22)
    body = np.maximum(np.abs(u + low), np.abs(u - low)) * root - side
    lobe_u, lobe_v = np.abs(u) - side * root, low + side * root
    return _exactly(np.minimum(body, np.sqrt(lobe_u * lobe_u + lobe_v * lobe_v) - side))


def _moon(u: Floats, v: Floats) -> Floats:
    """A disc with a smaller disc bitten out of its right side, moved so that it spins about its own middle."""
    disc_u, bite_u = u - np.float32(0.18), u - np.float32(0.93)
    disc, bite = (
        np.sqrt(disc_u * disc_u + v * v) - np.float32(1.05),
        np.sqrt(bite_u * bite_u + v * v) - np.float32(0.75),
    )
    return _exactly(np.maximum(disc, -bite))


SHAPES = {"square": _square, "triangle": _triangle, "star": _star, "cross": _cross, "heart": _heart, "moon": _moon}
