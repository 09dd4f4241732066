import io
import subprocess

import av
import numpy as np
import pytest
from PIL import Image

from data_pipeline.colour import BACKGROUND, Converter, lay_on
from data_pipeline.decode import decode_image, decode_video, probe
from data_pipeline.ffmpeg import ffmpeg_program
from data_pipeline.hdr import PEAK, mobius, to_sdr
from data_pipeline.media import opened

ORANGE = (200, 60, 20)


def flat(rgb, height=48, width=64, matrix=5, tag=None, full=False, pix_fmt="yuv420p", **tags):
    """Two frames of one colour, coded by `matrix`; `tag` is the matrix that the stream declares (None: nothing)."""
    return encode([np.full((height, width, 3), rgb, np.uint8)] * 2, "rgb24", matrix, tag, full, pix_fmt, **tags)


def encode(pictures, pixels, matrix, tag, full=False, pix_fmt="yuv420p", codec="libx264", **tags):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska" if codec == "ffv1" else "mp4") as out:
        stream = out.add_stream(codec, rate=10, options={"crf": "1"} if codec == "libx264" else {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        if tag is not None:
            context.colorspace = tag
        if full:
            context.color_range = 2
        for name, value in tags.items():
            setattr(context, name, value)
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, format=pixels)
            frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=2 if full else 1)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("BT.601, undeclared, small", {}),
        ("BT.709, undeclared, large", {"height": 720, "matrix": 1}),
        ("BT.709, declared", {"matrix": 1, "tag": 1}),
        ("BT.601, declared, large", {"height": 720, "tag": 5}),
        ("full range", {"full": True}),
        ("full range of BT.709", {"full": True, "matrix": 1, "tag": 1}),
        ("10 bits", {"pix_fmt": "yuv420p10le", "matrix": 1, "tag": 1}),
        ("10 bits, full chroma", {"pix_fmt": "yuv444p10le", "matrix": 1, "tag": 1}),
        ("BT.2020 matrix", {"pix_fmt": "yuv420p10le", "matrix": 9, "tag": 9}),
    ],
)
def test_colours_come_back_by_their_own_matrix_and_range(what, options):
    clip = flat(ORANGE, **options)
    for size in (None, (24, 32)):
        frames = decode_video(clip, lambda n, _: np.arange(n), size=size)
        assert np.abs(frames.astype(int) - ORANGE).max() <= 3, what


def ramps(height=32, width=48):
    """16-bit RGB signals: greys, primaries and mixtures from dark to bright."""
    signal = np.linspace(0, 65535, width)
    rows = [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0.8, 0.6), (0.2, 0.6, 1), (0.5, 1, 0.5), (0.9, 0.9, 1)]
    picture = np.stack([signal[:, None] * np.array(row) for row in rows]).repeat(height // len(rows), axis=0)
    return picture.astype(np.uint16)


def by_ffmpeg(clip, folder, transfer):
    (folder / "hdr.mkv").write_bytes(clip)
    chain = (
        f"zscale=tin={transfer}:pin=bt2020:min=bt2020nc:rin=tv:t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,"
        f"tonemap=mobius:param=0.3:peak={PEAK}:desat=0,zscale=t=bt709:m=gbr:r=pc,format=gbrp"
    )
    command = [
        ffmpeg_program(),
        "-v",
        "error",
        "-i",
        "hdr.mkv",
        "-vf",
        chain,
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    if b"No such filter" in done.stderr:
        pytest.skip("this ffmpeg was built without zscale")
    assert done.returncode == 0, done.stderr
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, 32, 48, 3)


@pytest.mark.parametrize(("transfer", "code", "name"), [("pq", 16, "smpte2084"), ("hlg", 18, "arib-std-b67")])
def test_hdr_is_mapped_as_ffmpegs_zscale_and_tonemap_do(tmp_path, transfer, code, name):
    tags = {"color_trc": code, "color_primaries": 9}
    clip = encode([ramps()], "rgb48le", 9, 9, pix_fmt="yuv444p12le", codec="ffv1", **tags)
    ours = decode_video(clip, lambda n, _: np.arange(n))
    theirs = by_ffmpeg(clip, tmp_path, name)
    assert ours.shape == theirs.shape
    gap = np.abs(ours.astype(int) - theirs)
    if transfer == "hlg":  # zscale bends R, G and B one by one, and BT.2100 their luma: greys alone are to be equal
        gap = gap[:, :4]
    assert gap.max() <= 4
    assert gap.mean() < 0.5
    # and it is not what would come out without: HDR read as if it were SDR
    plain = encode([ramps()], "rgb48le", 9, 9, pix_fmt="yuv444p12le", codec="ffv1")
    assert np.abs(decode_video(plain, lambda n, _: np.arange(n)).astype(int) - ours).max() > 40


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_hdr_is_mapped_as_the_standards_say_pixel_by_pixel(transfer):
    """ST 2084 and BT.2100 in double precision, one pixel at a time; BT.2087's matrix from the primaries themselves."""
    chroma_2020 = np.array([[0.708, 0.292], [0.170, 0.797], [0.131, 0.046], [0.3127, 0.3290]])
    chroma_709 = np.array([[0.64, 0.33], [0.30, 0.60], [0.15, 0.06], [0.3127, 0.3290]])

    def to_xyz(chroma):
        xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in chroma])
        return xyz[:3].T * np.linalg.solve(xyz[:3].T, xyz[3])

    to_709 = np.linalg.inv(to_xyz(chroma_709)) @ to_xyz(chroma_2020)
    luma = to_xyz(chroma_2020)[1]

    def light(signal):
        if transfer == "pq":
            root = signal ** (32 / 2523)
            return 10_000 * (max(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305)
        return signal**2 / 3 if signal <= 0.5 else (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12

    picture = np.random.default_rng(1).integers(0, 65536, (7, 9, 3), np.uint16)
    found = to_sdr(picture, transfer)
    for place in np.ndindex(7, 9):
        rgb = np.array([light(s / 65535) for s in picture[place]])
        if transfer == "hlg":
            rgb = 1000 * (luma @ rgb) ** 0.2 * rgb
        rgb = to_709 @ rgb / 203
        rgb *= float(mobius(np.float32(rgb.max()))) / rgb.max()
        assert np.abs(np.clip(rgb, 0, 1) ** (1 / 2.4) * 255 - found[place]).max() <= 0.6, place


def test_pq_white_and_mid_grey_lie_where_the_standards_put_them():
    """BT.2408: PQ 58 % is reference white, 203 cd/m2; 26 cd/m2 is PQ 38 %, mid grey, which no tone mapping touches."""
    white, grey, black, peak = (int(s * 65535) for s in (0.5806, 0.3793, 0.0, 0.7518))
    picture = np.array([[[level] * 3 for level in (white, grey, black, peak)]], np.uint16)
    found = to_sdr(picture, "pq")[0, :, 0]
    assert abs(int(found[0]) - round(255 * float(mobius(np.float32(1.0))) ** (1 / 2.4))) <= 1
    assert abs(int(found[1]) - round(255 * (26 / 203) ** (1 / 2.4))) <= 1
    assert found[2] == 0
    assert found[3] == 255
    assert 200 < found[0] < 235


def test_the_tone_curve_is_smooth_rising_and_ends_at_one():
    light = np.linspace(0, PEAK, 2001, dtype=np.float32)
    bent = mobius(light)
    assert np.array_equal(bent[light <= 0.3], light[light <= 0.3])
    slope = np.diff(bent) / np.diff(light)
    assert (slope > 0).all()
    assert np.abs(np.diff(slope)).max() < 0.02
    assert abs(float(bent[-1]) - 1) < 1e-5


def test_wide_gamut_without_hdr_is_brought_home():
    """A BT.2020 signal of a colour inside BT.709 gives the BT.709 signal of the same colour."""
    linear = np.array([0.5, 0.2, 0.05])
    to_2020 = np.linalg.inv(
        [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
    )

    def signal(x):
        return x ** (1 / 2.4)

    picture = np.round(signal(to_2020 @ linear) * 65535).astype(np.uint16)[None, None]
    assert np.abs(to_sdr(picture, "sdr")[0, 0] - signal(linear) * 255).max() <= 1
    tags = {"color_primaries": 9, "color_trc": 14}
    clip = encode([np.tile(picture, (32, 48, 1))], "rgb48le", 9, 9, pix_fmt="yuv444p12le", codec="ffv1", **tags)
    assert np.abs(decode_video(clip, lambda n, _: np.arange(n))[0, 9, 9] - signal(linear) * 255).max() <= 2


def test_a_real_hdr_clip_comes_out_upright_and_lit(media_dir):
    frames = decode_video((media_dir / "clips/exoplayer/dolbyVision-hdr.MOV").read_bytes(), lambda n, _: np.arange(n))
    assert frames.shape == (4, 1280, 720, 3)
    assert 20 < frames.mean() < 220
    assert frames.max() > 200


def picture_bytes(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode):
    image = Image.new("RGBA", (21, 11), (*ORANGE, 0))
    image.paste((10, 20, 30, 255), (0, 0, 10, 11))
    options = {}
    if mode == "P":
        image = image.convert("P")
        options["transparency"] = image.getpixel((15, 5))
    else:
        image = image.convert(mode)
    found = decode_image(picture_bytes(image, **options))[0]
    assert (found[:, 12:] == BACKGROUND).all()
    expected = 18 if mode == "LA" else (10, 20, 30)
    assert np.abs(found[:, :9].astype(int) - expected).max() <= (26 if mode == "P" else 1)


def test_half_transparent_pixels_mix_as_pillow_does():
    rgba = np.random.default_rng(0).integers(0, 256, (9, 13, 4), np.uint8)
    image = Image.fromarray(rgba)
    white = Image.new("RGBA", image.size, (*BACKGROUND, 255))
    expected = np.asarray(Image.alpha_composite(white, image).convert("RGB")).astype(int)
    assert np.abs(lay_on(rgba, BACKGROUND) - expected).max() <= 1
    assert np.abs(decode_image(picture_bytes(image))[0] - expected).max() <= 1


def test_a_webm_with_transparency_shows_the_background(media_dir):
    clip = (media_dir / "clips/moviepy/transparent.webm").read_bytes()
    frames = decode_video(clip, lambda n, _: np.arange(0, n, 10))
    assert (frames[:, 0, 0] >= 250).all()
    last = decode_video(clip, lambda n, _: np.array([140]))
    assert np.array_equal(last, frames[-1:])


def test_keyframes_of_a_transparent_webm_are_not_trusted(media_dir):
    """Its second, transparent stream has keyframes of its own: begun at one of the first, frames came out wrong."""
    clip = (media_dir / "clips/mediabunny/transparency-faulty.webm").read_bytes()
    with opened(clip) as media:
        packets = list(media.packets())[:60]
        whole = Converter("vp8").rgb(list(media.decode(packets))[43], 96, 54)
    assert packets[41].is_keyframe
    assert np.array_equal(decode_video(clip, lambda n, _: np.array([43]), size=(54, 96))[0], whole)


@pytest.mark.parametrize(("kind", "options"), [("webp", {"lossless": True}), ("gif", {}), ("png", {})])
def test_animations_are_sampled_by_time(kind, options):
    shades = [0, 40, 80, 120, 160, 200]
    pictures = [Image.fromarray(np.full((31, 45, 3), shade, np.uint8)) for shade in shades]
    times = [100, 100, 500, 100, 100, 100]
    data = picture_bytes(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=times, **options)
    found = probe(data)
    assert (found.kind, found.frames, found.width, found.height) == ("video", 6, 45, 31)
    seen = decode_video(data, lambda n, _: np.arange(n))[:, 9, 9, 0].tolist()
    assert seen == [0, 80, 80, 80, 120, 200]  # at 83, 250, 417, 583, 750 and 917 ms


def test_a_photograph_stands_as_its_camera_was_held():
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:10, :15] = 255
    image = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    found = decode_image(picture_bytes(image, "jpeg", exif=exif, quality=95))
    assert found.shape == (1, 30, 20, 3)
    assert np.abs(found[0].astype(int) - np.rot90(picture, 3)).mean() < 8
