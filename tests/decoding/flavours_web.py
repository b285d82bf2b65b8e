"""Flavours of PNG, WebP, GIF and BMP."""

import itertools
import struct
import zlib

import numpy as np
from common import EXACT, NEAR, exif, on_white, pillow, reference, stored_turned, xmp
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Start and step, across and down, of the seven passes of interlacing.
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, depth, colour, interlaced=False, before=b"", after=b""):
    """A PNG of an array of rows, pixels and samples."""
    height, width = samples.shape[:2]
    samples = samples.reshape(height, width, -1)

    def rows(part):
        out = b""
        for row in part:
            values = row.reshape(-1)
            if depth == 16:
                packed = values.astype(">u2").tobytes()
            elif depth == 8:
                packed = values.astype(np.uint8).tobytes()
            else:
                bits = "".join(format(int(v), f"0{depth}b") for v in values)
                bits += "0" * (-len(bits) % 8)
                packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
            out += b"\0" + packed
        return out

    if interlaced:
        parts = [samples[y::dy, x::dx] for x, y, dx, dy in PASSES]
        raw = b"".join(rows(part) for part in parts if part.size)
    else:
        raw = rows(samples)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    return (
        SIGNATURE + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(raw)) + after + chunk(b"IEND", b"")
    )


def add(cases):
    add_png(cases)
    add_webp(cases)
    add_gif(cases)
    add_bmp(cases)


def add_png(cases):
    rgb = np.asarray(cases.picture).astype(np.uint32)
    grey = np.asarray(cases.picture.convert("L")).astype(np.uint32)
    ramp = np.broadcast_to(np.linspace(0, 255, cases.width).astype(np.uint32), grey.shape)
    for interlaced in (False, True):
        name = "-interlaced" if interlaced else ""
        for depth in (1, 2, 4, 8, 16):
            most = (1 << depth) - 1
            values = grey * most // 255 if depth < 16 else grey * 257
            shown = (values * 255 // most).astype(np.uint8)
            pixels = np.dstack([shown] * 3)
            cases.add(f"grey-{depth}{name}.png", png(values, depth, 0, interlaced), EXACT, pixels, must=True)
            # The brightest value is transparent, on white it looks the same.
            opaque = chunk(b"tRNS", struct.pack(">H", most))
            cases.add(f"grey-{depth}-transparent{name}.png", png(values, depth, 0, interlaced, opaque), EXACT, pixels, must=True)
            if depth <= 8:
                indexed = cases.picture.quantize(1 << depth)
                palette = bytes(indexed.getpalette()[: 3 << depth])
                palette += bytes((3 << depth) - len(palette))
                values = np.asarray(indexed)
                before = chunk(b"PLTE", palette)
                cases.add(f"palette-{depth}{name}.png", png(values, depth, 3, interlaced, before), EXACT, must=True)
                before += chunk(b"tRNS", b"\0\x80")
                cases.add(f"palette-{depth}-transparent{name}.png", png(values, depth, 3, interlaced, before), NEAR, must=True)
            if depth >= 8:
                scale = 257 if depth == 16 else 1
                cases.add(f"rgb-{depth}{name}.png", png(rgb * scale, depth, 2, interlaced), EXACT, cases.picture, must=True)
                rgba = np.dstack([rgb, ramp]) * scale
                shown = on_white(Image.fromarray(np.dstack([rgb, ramp]).astype(np.uint8)))
                cases.add(f"rgba-{depth}{name}.png", png(rgba, depth, 6, interlaced), NEAR, shown, must=True)
                shown = on_white(Image.fromarray(np.dstack([grey] * 3 + [ramp]).astype(np.uint8)))
                data = png(np.dstack([grey, ramp]) * scale, depth, 4, interlaced)
                cases.add(f"grey-alpha-{depth}{name}.png", data, NEAR, shown, must=True)
    for name, extra in (
        ("gamma", chunk(b"gAMA", struct.pack(">I", 100_000))),
        ("srgb", chunk(b"sRGB", b"\0")),
        ("profile", chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(200)))),
        ("broken-profile", chunk(b"iCCP", b"x\0\0not zlib")),
        ("chromaticity", chunk(b"cHRM", struct.pack(">8I", *range(10_000, 90_000, 10_000)))),
        ("bomb-in-text", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)))),
    ):
        cases.add(f"{name}.png", png(rgb, 8, 2, before=extra), EXACT, cases.picture, must=True)
    add_png_orientations(cases)
    whole = pillow("PNG", cases.picture)
    cases.add("trailing-bytes.png", whole + b"garbage" * 50, EXACT, must=True)
    frames = {"save_all": True, "append_images": [cases.picture.rotate(180)], "duration": 100}
    cases.add("animated.png", pillow("PNG", cases.picture, **frames), EXACT, cases.picture, must=True)
    clear = Image.new("RGBA", cases.picture.size, (0, 0, 0, 0))
    blank_first = pillow("PNG", clear, save_all=True, append_images=[cases.picture.convert("RGBA")], duration=100)
    cases.add("animated-blank-first.png", blank_first, EXACT, cases.picture, must=True)
    cases.cut_and_overwrite("png", "png", whole, notices=True)
    cases.cut_and_overwrite("png-interlaced", "png", png(rgb, 8, 2, True), notices=True)
    cases.foreign("apple.png", SIGNATURE + chunk(b"CgBI", b"\x50\0\x20\x02") + whole[8:])


def add_png_orientations(cases):
    turned = np.asarray(stored_turned(cases.picture, 6)).astype(np.uint32)
    raw = b"\nexif\n      " + str(len(exif(6)) + 6).encode() + b"\n" + (b"Exif\0\0" + exif(6)).hex().encode() + b"\n"
    for name, before, after in (
        ("exif-6", chunk(b"eXIf", exif(6)), b""),
        ("exif-6-big-endian", chunk(b"eXIf", exif(6, True)), b""),
        ("exif-6-behind-pixels", b"", chunk(b"eXIf", exif(6))),
        ("xmp-6", chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)), b""),
        ("xmp-6-compressed", chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + zlib.compress(xmp(6))), b""),
        ("raw-profile-6", chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)), b""),
    ):
        data = png(turned, 8, 2, before=before, after=after)
        cases.add(f"{name}.png", data, EXACT, cases.picture, must=True)


def webp_with(data, kind, payload):
    """A WebP whose chunk of this kind, the last, has another payload."""
    at = data.index(kind)
    out = data[:at] + kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) & 1)
    return out[:4] + struct.pack("<I", len(out) - 8) + out[8:]


def add_webp(cases):
    image = cases.picture
    lossy = pillow("WEBP", image, quality=92)
    lossless = pillow("WEBP", image, lossless=True)
    cases.add("lossy.webp", lossy, NEAR, must=True)
    cases.add("lossy-texture.webp", pillow("WEBP", cases.texture, quality=60), NEAR, must=True)
    cases.add("lossless.webp", lossless, EXACT, image, must=True)
    faded = image.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(image.size))
    cases.add("alpha.webp", pillow("WEBP", faded, quality=92), NEAR, must=True)
    cases.add("alpha-lossless.webp", pillow("WEBP", faded, lossless=True, exact=True), NEAR, must=True)
    frames = {"save_all": True, "append_images": [image.rotate(180)], "duration": 100}
    cases.add("animated.webp", pillow("WEBP", image, quality=92, **frames), NEAR, must=True)
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    blank_first = pillow("WEBP", clear, save_all=True, append_images=[image.convert("RGBA")], duration=100, lossless=True)
    # The decoder rounds when it joins frames.
    cases.add("animated-blank-first.webp", blank_first, NEAR, image, must=True)
    turned = stored_turned(image, 6)
    tagged = pillow("WEBP", turned, lossless=True, exif=exif(6))
    for name, payload in (
        ("exif-6", exif(6)), ("exif-6-big-endian", exif(6, True)), ("exif-6-with-prefix", b"Exif\0\0" + exif(6)),
        ("exif-6-with-two-prefixes", b"Exif\0\0Exif\0\0" + exif(6)),
    ):
        cases.add(f"{name}.webp", webp_with(tagged, b"EXIF", payload), EXACT, image, must=True)
    cases.add("xmp-6.webp", pillow("WEBP", turned, lossless=True, xmp=xmp(6)), EXACT, image, must=True)
    cases.add("trailing-bytes.webp", lossy + b"x" * 100, NEAR, must=True)
    cases.cut_and_overwrite("webp", "webp", lossy, notices=False)
    cases.cut_and_overwrite("webp-lossless", "webp", lossless, notices=False)
    cases.damaged("webp-last-bytes-missing.webp", lossless[:-2])


def add_gif(cases):
    image = cases.picture.quantize(200)
    plain = pillow("GIF", image)
    cases.add("plain.gif", plain, EXACT, must=True)
    cases.add("interlaced.gif", pillow("GIF", image, interlace=True), EXACT, must=True)
    cases.add("sixteen-colours.gif", pillow("GIF", cases.picture.quantize(16)), EXACT, must=True)
    cases.add("grey.gif", pillow("GIF", cases.picture.convert("L")), EXACT, must=True)
    cases.add("transparent.gif", pillow("GIF", image, transparency=3), EXACT, must=True)
    frames = {"save_all": True, "append_images": [cases.picture.rotate(180)], "duration": 100}
    cases.add("animated.gif", pillow("GIF", cases.picture, **frames), EXACT, must=True)
    # The first frame shows nothing, the second the picture.
    block = plain.index(b",", 13 + 3 * 256)
    head, frame = plain[:block], plain[block:-1]
    control = b"!\xf9\x04\x01\x0a\0\0\0"
    blank = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    head = head if head[:6] == b"GIF89a" else b"GIF89a" + head[6:]
    cases.add("blank-first.gif", head + control + blank + b"!\xf9\x04\0\x0a\0\0\0" + frame + b";", EXACT, reference(plain), must=True)
    cases.add("without-trailer.gif", plain[:-1], EXACT)
    cases.add("trailing-bytes.gif", plain + b"x" * 100, EXACT, must=True)
    for name, size in (("screen-0x0", (0, 0)), ("screen-smaller", (cases.width // 2, cases.height // 2))):
        data = plain[:6] + struct.pack("<HH", *size) + plain[10:]
        cases.add(f"{name}.gif", data, EXACT, reference(plain), must=True)
    cases.cut_and_overwrite("gif", "gif", plain, notices=False)


def bmp(rows, bits, size, compression=0, palette=b"", masks=b"", header=40):
    """A BMP of packed rows, from the last to the first."""
    width, height = size
    if header == 12:
        head = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        head = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
        head += masks
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + palette + rows


def add_bmp(cases):
    image, size = cases.picture, cases.picture.size
    rgb = np.asarray(image)
    flipped = rgb[::-1]
    plain = pillow("BMP", image)
    cases.add("24.bmp", plain, EXACT, image, must=True)
    for name, source in (("8", image.quantize(255)), ("1", image.convert("1")), ("grey", image.convert("L"))):
        cases.add(f"{name}.bmp", pillow("BMP", source), EXACT, must=True)
    cases.add("32-alpha.bmp", pillow("BMP", image.convert("RGBA")), EXACT, image, must=True)
    padded = np.dstack([flipped[:, :, ::-1], np.zeros(size[::-1], np.uint8)]).tobytes()
    cases.add("32-padded.bmp", bmp(padded, 32, size), EXACT, image, must=True)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    cases.add("32-alpha-0.bmp", bmp(padded, 32, size, 3, masks=masks, header=108), EXACT, image, must=True)
    r, g, b = (flipped[:, :, i].astype(np.uint16) for i in range(3))
    for name, values, masks in (
        ("565", (r >> 3) << 11 | (g >> 2) << 5 | b >> 3, (0xF800, 0x7E0, 0x1F)),
        ("555", (r >> 3) << 10 | (g >> 3) << 5 | b >> 3, (0x7C00, 0x3E0, 0x1F)),
    ):
        data = bmp(values.astype("<u2").tobytes(), 16, size, 3, masks=struct.pack("<III", *masks))
        cases.add(f"{name}.bmp", data, NEAR, must=True)
    top_down = bmp(rgb[:, :, ::-1].tobytes(), 24, (size[0], -size[1]))
    cases.add("top-down.bmp", top_down, EXACT, image, must=True)
    cases.add("os2.bmp", bmp(flipped[:, :, ::-1].tobytes(), 24, size, header=12), EXACT, image, must=True)
    indexed = image.quantize(16)
    values = np.asarray(indexed)[::-1]
    colours = np.array(indexed.getpalette()[:48], np.uint8).reshape(16, 3)
    palette = b"".join(bytes([b, g, r, 0]) for r, g, b in colours)
    shown = colours[np.asarray(indexed)]
    four = np.array([[int(a) << 4 | int(b) for a, b in zip(row[::2], row[1::2])] for row in values], np.uint8).tobytes()
    cases.add("4.bmp", bmp(four, 4, size, palette=palette), EXACT, shown, must=True)
    for name, bits, compression in (("rle8", 8, 1), ("rle4", 4, 2)):
        data = bmp(run_lengths(values, bits), bits, size, compression, palette=palette)
        cases.add(f"{name}.bmp", data, EXACT, shown, must=True)
    for percent in (20, 50, 80, 95):
        cases.damaged(f"bmp-cut-{percent}.bmp", plain[: len(plain) * percent // 100])


def run_lengths(values, bits):
    """Rows as runs of equal pixels."""
    out = b""
    for row in values:
        for value, group in itertools.groupby(row.tolist()):
            count = len(list(group))
            pair = value << 4 | value if bits == 4 else value
            while count:
                out += bytes([min(count, 255), pair])
                count -= min(count, 255)
        out += b"\0\0"
    return out + b"\0\1"


