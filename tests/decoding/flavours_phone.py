"""Flavours of HEIC, with containers written by hand, and of JPEG XL; and files of other formats."""

import io
import struct

import imagecodecs
import numpy as np
import pillow_heif
from common import EXACT, NEAR, SUBSAMPLED, cjpeg, exif, on_white, pillow, reference
from PIL import Image


def boxes(data, at=0, end=None):
    end = len(data) if end is None else end
    while at + 8 <= end:
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, at + 8, at + size
        at += size


def find(data, path, at=0, end=None):
    for kind, start, stop in boxes(data, at, end):
        if kind == path[0]:
            if len(path) == 1:
                return start, stop
            return find(data, path[1:], start + (4 if kind == b"meta" else 0), stop)
    raise ValueError(path)


def coded(image, form="HEIF", **options):
    """Properties and coded bytes of the only item of a HEIC or AVIF, as libheif or libavif write it."""
    data = pillow(form, image, quality=80, **options)
    start, stop = find(data, [b"meta", b"iprp", b"ipco"])
    kept = (b"hvcC", b"av1C", b"ispe", b"pixi", b"colr")
    properties = [(box(k, data[s:e]), k in kept[:2]) for k, s, e in boxes(data, start, stop) if k in kept]
    # One item of one extent in the file: its offset and size are the last two numbers of the box.
    start, end = find(data, [b"meta", b"iloc"])
    sizes = [data[start + 4] >> 4, data[start + 4] & 15, data[start + 5] >> 4]
    assert sizes[:2] == [4, 4] and struct.unpack(">H", data[start + 6 : start + 8]) == (1,), data[start:end].hex()
    offset, size = struct.unpack(">II", data[end - 8 : end])
    if sizes[2] == 4:
        offset += struct.unpack(">I", data[end - 14 : end - 10])[0]
    return properties, data[offset : offset + size]


def box(kind, body):
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full_box(kind, body, version=0, flags=0):
    return box(kind, struct.pack(">I", version << 24 | flags) + body)


def heif(items, primary, references=(), brand=b"heic", other=None):
    """`items`: identifier, type, bytes, [(property, essential)], hidden."""
    properties, associations = [], b""
    for identifier, _, _, own, _ in items:
        entries = b""
        for prop, essential in own:
            if prop not in properties:
                properties.append(prop)
            entries += bytes([(0x80 if essential else 0) | (properties.index(prop) + 1)])
        associations += struct.pack(">HB", identifier, len(own)) + entries
    entries = b"".join(
        full_box(b"infe", struct.pack(">HH4s", i, 0, kind) + b"\0", 2, int(hidden)) for i, kind, _, _, hidden in items
    )
    links = b"".join(
        box(kind, struct.pack(">HH", source, len(to)) + b"".join(struct.pack(">H", t) for t in to))
        for kind, source, to in references
    )

    def meta(offset):
        places = struct.pack(">BBH", 0x44, 0, len(items))
        for identifier, _, data, _, _ in items:
            places += struct.pack(">HHHII", identifier, 0, 1, offset, len(data))
            offset += len(data)
        return full_box(
            b"meta",
            full_box(b"hdlr", bytes(4) + b"pict" + bytes(13)) + full_box(b"pitm", struct.pack(">H", primary))
            + full_box(b"iloc", places) + full_box(b"iinf", struct.pack(">H", len(items)) + entries)
            + (full_box(b"iref", links) if links else b"")
            + box(b"iprp", box(b"ipco", b"".join(properties)) + full_box(b"ipma", struct.pack(">I", len(items)) + associations)),
        )

    file_type = box(b"ftyp", brand + bytes(4) + b"mif1" + (other or brand) + b"miaf")
    start = len(file_type) + len(meta(0)) + 8
    return file_type + meta(start) + box(b"mdat", b"".join(data for _, _, data, _, _ in items))


def turn(quarters):
    return box(b"irot", bytes([quarters])), True


def mirror(axis):
    return box(b"imir", bytes([axis])), True


def extent(width, height):
    return full_box(b"ispe", struct.pack(">II", width, height)), False


def exif_item(identifier, orientation):
    return identifier, b"Exif", struct.pack(">I", 6) + b"Exif\0\0" + exif(orientation), [], True


def add(cases):
    add_heic(cases)
    add_heic_variants(cases)
    add_jpeg_xl(cases)
    add_foreign(cases)


def add_heic(cases):
    properties, data = coded(cases.picture)

    def single(extra, more=(), references=()):
        return heif([(1, b"hvc1", data, [*properties, *extra], False), *more], 1, references)

    cases.add("plain.heic", single([]), SUBSAMPLED, must=True)
    for quarters in (1, 2, 3):
        cases.add(f"turn-{quarters}.heic", single([turn(quarters)]), SUBSAMPLED, must=True)
    for axis in (0, 1):
        cases.add(f"mirror-{axis}.heic", single([mirror(axis)]), SUBSAMPLED, must=True)
        cases.add(f"turn-1-mirror-{axis}.heic", single([turn(1), mirror(axis)]), SUBSAMPLED, must=True)
    # As phones write it: the turn in the container and again in EXIF, of which only the first counts.
    link = [(b"cdsc", 2, [1])]
    cases.add("turn-3-exif-6.heic", single([turn(3)], [exif_item(2, 6)], link), SUBSAMPLED, must=True)
    pixels = reference(single([]))
    cases.add("exif-6-without-turn.heic", single([], [exif_item(2, 6)], link), SUBSAMPLED, pixels, must=True)
    # A grid of 2×2 tiles that is larger than the image.
    width, height = 64, 64
    large = Image.new("RGB", (2 * width, 2 * height), (128, 128, 128))
    scaled = cases.picture.resize((116, 98))
    large.paste(scaled, (0, 0))
    corners = [(width * x, height * y, width * x + width, height * y + height) for y in (0, 1) for x in (0, 1)]
    tiles = [coded(large.crop(corner)) for corner in corners]

    def grid(extra, count=4):
        parts = [(i + 1, b"hvc1", tile[1], tile[0], True) for i, tile in enumerate(tiles[:count])]
        whole = (5, b"grid", struct.pack(">BBBBHH", 0, 0, 1, 1, *scaled.size), [extent(*scaled.size), *extra], False)
        return heif([*parts, whole], 5, [(b"dimg", 5, list(range(1, count + 1)))])

    for name, extra in (("grid", []), ("grid-turn-1", [turn(1)]), ("grid-turn-3", [turn(3)]), ("grid-mirror-0", [mirror(0)])):
        cases.add(f"{name}.heic", grid(extra), SUBSAMPLED, must=True)
    cases.damaged("grid-without-a-tile.heic", grid([], 3))
    small, other = coded(cases.picture.resize((32, 24))), coded(cases.picture.rotate(180))
    last = heif(
        [(1, b"hvc1", other[1], other[0], False), (2, b"hvc1", small[1], small[0], True), (3, b"hvc1", data, properties, False)],
        3, [(b"thmb", 2, [3])],
    )
    cases.add("primary-last.heic", last, SUBSAMPLED, must=True)
    cases.cut_and_overwrite("heic", "heic", pillow("HEIF", cases.picture, quality=80), notices=False)


def add_heic_variants(cases):
    image = cases.picture
    cases.add("pillow.heic", pillow("HEIF", image, quality=80), SUBSAMPLED, must=True)
    cases.add("texture.heic", pillow("HEIF", cases.texture, quality=60), SUBSAMPLED, must=True)
    cases.add("444.heic", pillow("HEIF", image, quality=80, chroma=444), NEAR, must=True)
    cases.add("422.heic", pillow("HEIF", image, quality=80, chroma=422), SUBSAMPLED)
    cases.add("grey.heic", pillow("HEIF", image.convert("L"), quality=80), NEAR, must=True)
    faded = image.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(image.size))
    cases.add("alpha.heic", pillow("HEIF", faded, quality=80), SUBSAMPLED, must=True)
    deep = (np.asarray(image).astype(np.uint16) * 257).tobytes()
    for bits in (10, 12):
        pillow_heif.options.SAVE_HDR_TO_12_BIT = bits == 12
        out = io.BytesIO()
        pillow_heif.from_bytes("RGB;16", image.size, deep).save(out, quality=80)
        cases.add(f"{bits}-bit.heic", out.getvalue(), SUBSAMPLED, must=bits == 10)


def add_jpeg_xl(cases):
    image = cases.picture
    rgb = np.asarray(image)
    grey = np.asarray(image.convert("L"))
    faded = image.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(image.size))
    encode = imagecodecs.jpegxl_encode

    def decoded(data):
        pixels = imagecodecs.jpegxl_decode(data)
        pixels = pixels[0] if pixels.ndim == 4 else pixels
        return np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels[:, :, :3]

    for name, data in {
        "lossy": encode(rgb, level=90), "lossy-container": encode(rgb, level=90, usecontainer=True),
        "lossy-texture": encode(np.asarray(cases.texture), level=60), "lossy-grey": encode(grey, level=90),
        "jpeg-444": imagecodecs.jpegxl_encode_jpeg(cjpeg(image, "-sample", "1x1")),
        "jpeg-420": imagecodecs.jpegxl_encode_jpeg(cjpeg(image)),
        "jpeg-422-progressive": imagecodecs.jpegxl_encode_jpeg(cjpeg(image, "-sample", "2x1", "-progressive")),
        "jpeg-grey": imagecodecs.jpegxl_encode_jpeg(pillow("JPEG", image.convert("L"), quality=92)),
    }.items():
        cases.add(f"{name}.jxl", data, NEAR, decoded(data), must=True)
    cases.add("lossless.jxl", encode(rgb, lossless=True), EXACT, rgb, must=True)
    cases.add("lossless-grey.jxl", encode(grey, lossless=True), EXACT, np.dstack([grey] * 3), must=True)
    cases.add("alpha.jxl", encode(np.asarray(faded), lossless=True), NEAR, on_white(faded), must=True)
    cases.add("animated.jxl", encode(np.stack([rgb, rgb[::-1]]), lossless=True, photometric="rgb"), EXACT, rgb, must=True)
    # The encoder marks these as linear.
    linear = rgb / 255
    shown = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255 + 0.5
    deep = rgb.astype(np.uint16) * 257
    cases.add("linear-16.jxl", encode(deep, lossless=True), NEAR, shown.astype(np.uint8), must=True)
    cases.add("linear-float.jxl", encode(linear.astype(np.float32), lossless=True), NEAR, shown.astype(np.uint8), must=True)
    for orientation in (3, 6):
        turned = pillow("JPEG", image, quality=92, subsampling=0, exif=b"Exif\0\0" + exif(orientation))
        data = imagecodecs.jpegxl_encode_jpeg(turned)
        cases.add(f"jpeg-exif-{orientation}.jxl", data, NEAR, decoded(data), must=True)
    for name, data in (("jxl", encode(rgb, level=90)), ("jxl-lossless", encode(rgb, lossless=True))):
        cases.cut_and_overwrite(name, "jxl", data, notices=False)


def add_foreign(cases):
    """Formats that are not read: rejected by name."""
    image = cases.picture
    rgb = np.asarray(image)
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
    psd = b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 2, 2, 8, 3) + bytes(14) + bytes(12)
    for name, data in {
        "jp2": imagecodecs.jpeg2k_encode(rgb, codecformat="jp2"), "j2k": imagecodecs.jpeg2k_encode(rgb, codecformat="j2k"),
        "jxr": imagecodecs.jpegxr_encode(rgb), "ico": pillow("ICO", image), "ppm": pillow("PPM", image),
        "pdf": pillow("PDF", image), "qoi": imagecodecs.qoi_encode(rgb), "dds": pillow("DDS", image), "svg": svg, "psd": psd,
        "cr2": b"II*\0\x10\0\0\0CR\x02\0" + bytes(200),
        "cr3": box(b"ftyp", b"crx " + bytes(4) + b"crx isom") + bytes(200),
        "raf": b"FUJIFILMCCD-RAW 0201" + bytes(200), "mp4": box(b"ftyp", b"isom" + bytes(4) + b"isommp41") + bytes(200),
    }.items():
        cases.foreign(f"other.{name}", data)
