"""Flavours of AVIF; where a container says more than Pillow writes, it is written by hand."""

import io
import struct

import imagecodecs
import numpy as np
from common import EXACT, NEAR, SUBSAMPLED, on_white, pillow, reference
from flavours_phone import box, coded, exif_item, extent, heif, mirror, turn
from PIL import Image


def add(cases):
    add_pictures(cases)
    add_codings(cases)
    add_containers(cases)


def add_pictures(cases):
    image = cases.picture
    sharing = {"420": SUBSAMPLED, "422": SUBSAMPLED, "444": NEAR}
    for layout, rule in sharing.items():
        subsampling = ":".join(layout)
        cases.add(f"{layout}.avif", pillow("AVIF", image, quality=80, subsampling=subsampling), rule, must=True)
        odd = image.resize((image.width - 1, image.height - 1))
        cases.add(f"{layout}-odd.avif", pillow("AVIF", odd, quality=80, subsampling=subsampling), rule, must=True)
        limited = pillow("AVIF", image, quality=80, subsampling=subsampling, range="limited")
        cases.add(f"{layout}-limited.avif", limited, rule, must=True)
    for size in ((1, 1), (2, 3), (17, 1), (1, 33)):
        tiny = pillow("AVIF", image.resize(size), quality=80, subsampling="4:4:4")
        cases.add(f"{size[0]}x{size[1]}.avif", tiny, NEAR, must=True)
    cases.add("texture.avif", pillow("AVIF", cases.texture, quality=60, subsampling="4:4:4"), NEAR, must=True)
    cases.add("texture-420.avif", pillow("AVIF", cases.texture, quality=60), SUBSAMPLED, must=True)
    for limits in ("full", "limited"):
        grey = pillow("AVIF", image.convert("L"), quality=80, subsampling="4:0:0", range=limits)
        cases.add(f"grey-{limits}.avif", grey, NEAR, must=True)
    faded = image.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(image.size))
    for name, options in {"alpha": {}, "alpha-limited": {"range": "limited"}, "alpha-premultiplied": {"alpha_premultiplied": True}}.items():
        cases.add(f"{name}.avif", pillow("AVIF", faded, quality=80, subsampling="4:4:4", **options), NEAR, must=True)
    frames = {"save_all": True, "append_images": [image.rotate(180)], "quality": 80, "subsampling": "4:4:4"}
    cases.add("animated.avif", pillow("AVIF", image, **frames), NEAR, must=True)
    hidden = faded.copy()
    hidden.putalpha(0)
    frames = pillow("AVIF", hidden, **(frames | {"append_images": [hidden, faded]}))
    shown = Image.open(io.BytesIO(frames))
    shown.seek(2)
    cases.add("animated-first-frames-hidden.avif", frames, NEAR, on_white(shown))
    for name, options in {"420": {}, "444": {"subsampling": "4:4:4"}, "alpha": {"subsampling": "4:4:4"}}.items():
        data = pillow("AVIF", faded if name == "alpha" else image, quality=80, **options)
        cases.cut_and_overwrite(f"avif-{name}", "avif", data, notices=False)


def add_codings(cases):
    """Depths and matrices that Pillow reads, and does not write."""
    rgb = np.asarray(cases.picture)
    encode = imagecodecs.avif_encode
    for bits in (10, 12):
        deep = (rgb.astype(np.uint32) * ((1 << bits) - 1) // 255).astype(np.uint16)
        for layout, rule in {"420": SUBSAMPLED, "422": SUBSAMPLED, "444": NEAR}.items():
            data = encode(deep, level=80, bitspersample=bits, pixelformat=layout)
            cases.add(f"{bits}-bit-{layout}.avif", data, rule, must=True)
        grey = encode(deep[:, :, 1], level=80, bitspersample=bits, pixelformat="400")
        cases.add(f"{bits}-bit-grey.avif", grey, NEAR, must=True)
    cases.add("lossless.avif", encode(rgb, level=100, pixelformat="444", matrix=0), EXACT, rgb, must=True)
    for matrix in (1, 2, 4, 6, 7, 8, 9):
        data = encode(rgb, level=90, pixelformat="444", matrix=matrix)
        cases.add(f"matrix-{matrix}.avif", data, NEAR, must=matrix not in (4, 7))
        # Only the header of AV1 says it.
        without = data.replace(b"colrnclx", b"freenclx")
        assert without != data
        cases.add(f"matrix-{matrix}-without-colr.avif", without, NEAR, must=matrix not in (4, 7))


def add_containers(cases):
    properties, data = coded(cases.picture, "AVIF")

    def avif(items, primary, references=()):
        return heif(items, primary, references, brand=b"avif")

    def single(extra, more=(), references=()):
        return avif([(1, b"av01", data, [*properties, *extra], False), *more], 1, references)

    cases.add("plain.avif", single([]), SUBSAMPLED, must=True)
    for quarters in (1, 2, 3):
        cases.add(f"turn-{quarters}.avif", single([turn(quarters)]), SUBSAMPLED, must=True)
        for axis in (0, 1):
            turned = single([turn(quarters), mirror(axis)])
            cases.add(f"turn-{quarters}-mirror-{axis}.avif", turned, SUBSAMPLED, must=True)
    for axis in (0, 1):
        cases.add(f"mirror-{axis}.avif", single([mirror(axis)]), SUBSAMPLED, must=True)
    link = [(b"cdsc", 2, [1])]
    pixels = reference(single([]))
    # Of EXIF the orientation does not count.
    cases.add("exif-6-without-turn.avif", single([], [exif_item(2, 6)], link), SUBSAMPLED, pixels, must=True)
    cases.add("turn-3-exif-6.avif", single([turn(3)], [exif_item(2, 6)], link), SUBSAMPLED, np.rot90(pixels, 3), must=True)
    width, height = cases.picture.size
    crop = [width, 1, height, 1, 0, 1, 0, 1]
    cases.add("clap-whole.avif", single([(box(b"clap", struct.pack(">8I", *crop)), True)]), SUBSAMPLED, must=True)
    crop[0] = width // 2
    cases.add("clap.avif", single([(box(b"clap", struct.pack(">8I", *crop)), True)]), SUBSAMPLED)
    same = [(1, b"av01", data, properties, True), (2, b"iden", b"", [extent(width, height)], False)]
    cases.add("identity.avif", avif(same, 2, [(b"dimg", 2, [1])]), SUBSAMPLED, pixels)
    cases.add("major-brand-mif1.avif", heif([(1, b"av01", data, properties, False)], 1, (), b"mif1", b"avif"), SUBSAMPLED, pixels, must=True)

    # Grids of 2×2 tiles: larger than the image, and exactly as large.
    side = 64
    for name, (right, bottom), layout, rule in (("grid", (116, 98), "420", SUBSAMPLED), ("grid-exact", (128, 128), "444", NEAR)):
        large = Image.new("RGB", (2 * side, 2 * side), (128, 128, 128))
        large.paste(cases.picture.resize((right, bottom)), (0, 0))
        corners = [(side * x, side * y, side * x + side, side * y + side) for y in (0, 1) for x in (0, 1)]
        tiles = [coded(large.crop(corner), "AVIF", subsampling=":".join(layout)) for corner in corners]

        def grid(extra, count=4):
            parts = [(i + 1, b"av01", tile[1], tile[0], True) for i, tile in enumerate(tiles[:count])]
            body = struct.pack(">BBBBHH", 0, 0, 1, 1, right, bottom)
            whole = (5, b"grid", body, [extent(right, bottom), *extra], False)
            return avif([*parts, whole], 5, [(b"dimg", 5, list(range(1, count + 1)))])

        cases.add(f"{name}.avif", grid([]), rule, must=True)
        pixels = np.rot90(reference(grid([])), 1)
        cases.add(f"{name}-turn-1.avif", grid([turn(1)]), rule, pixels, must=True)
        cases.damaged(f"{name}-without-a-tile.avif", grid([], 3))
    small, other = coded(cases.picture.resize((32, 24)), "AVIF"), coded(cases.picture.rotate(180), "AVIF")
    last = avif(
        [(1, b"av01", other[1], other[0], False), (2, b"av01", small[1], small[0], True), (3, b"av01", data, properties, False)],
        3, [(b"thmb", 2, [3])],
    )
    cases.add("primary-last.avif", last, SUBSAMPLED, must=True)
