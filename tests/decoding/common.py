"""The picture that all flavours show, and how cases are collected."""

import base64
import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import tempfile
import warnings
import zlib

import imagecodecs
import numpy as np
import pillow_heif
from PIL import Image, ImageDraw, ImageOps

pillow_heif.register_heif_opener()
warnings.simplefilter("ignore")

# Largest mean and largest single difference, of 255, to the reference.
EXACT, NEAR, SUBSAMPLED = (0, 0), (1, 16), (1.3, 255)


@dataclasses.dataclass
class Case:
    """One file. `kind`: `sound` must be right or rejected by name, right if `must`; `damaged` must be rejected;
    `overwritten` may be accepted, because nothing in the file can show the damage; `foreign` must be rejected by
    name."""

    name: str
    data: bytes
    kind: str
    must: bool = False
    pixels: np.ndarray | None = None
    rule: tuple = EXACT


class Cases:
    """Collects the cases of one format after the other."""

    def __init__(self, size):
        self.width, self.height = size
        self.all = []
        self.picture = draw(*size)
        self.texture = texture(*size)

    def add(self, name, data, rule, pixels=None, must=False):
        """A sound file; the reference is Pillow's if no pixels are given."""
        pixels = reference(data) if pixels is None else np.asarray(pixels)
        self.all.append(Case(name, data, "sound", must, pixels, rule))

    def damaged(self, name, data):
        self.all.append(Case(name, data, "damaged"))

    def overwritten(self, name, data):
        self.all.append(Case(name, data, "overwritten"))

    def foreign(self, name, data):
        self.all.append(Case(name, data, "foreign"))

    def cut_and_overwrite(self, name, extension, data, notices):
        """The file cut at several places, and with bytes overwritten; `notices`: whether a checksum shows it."""
        for percent in (20, 50, 80, 95):
            self.damaged(f"{name}-cut-{percent}.{extension}", data[: len(data) * percent // 100])
        middle = len(data) // 2
        data = data[:middle] + bytes((i * 37 + 11) & 127 for i in range(12)) + data[middle + 12 :]
        name = f"{name}-overwritten.{extension}"
        if notices:
            self.damaged(name, data)
        else:
            self.overwritten(name, data)

    def write(self, file):
        """One line of JSON per distinct reference and per case."""
        lines, seen = [], set()
        for case in self.all:
            line = {"name": case.name, "kind": case.kind, "data": base64.b64encode(case.data).decode()}
            if case.pixels is not None:
                rgb = np.ascontiguousarray(case.pixels, dtype=np.uint8)
                assert rgb.ndim == 3 and rgb.shape[2] == 3, (case.name, rgb.shape)
                key = hashlib.sha256(rgb.tobytes() + str(rgb.shape).encode()).hexdigest()[:16]
                if key not in seen:
                    seen.add(key)
                    packed = base64.b64encode(zlib.compress(rgb.tobytes(), 9)).decode()
                    lines.append({"pixels": key, "width": rgb.shape[1], "height": rgb.shape[0], "data": packed})
                line |= {"expected": key, "must": case.must, "mean": case.rule[0], "max": case.rule[1]}
            lines.append(line)
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        # The same bytes for the same cases.
        with open(file, "wb") as out, gzip.GzipFile(fileobj=out, mode="wb", mtime=0, filename="") as packed:
            packed.write(text)


def draw(width, height):
    """Shapes with hard edges on a gradient."""
    y, x = np.mgrid[0:height, 0:width]
    gradient = np.stack([x * 255 / width, y * 255 / height, 200 - x * 150 / width], -1).astype(np.uint8)
    image = Image.fromarray(gradient)
    d, u = ImageDraw.Draw(image), min(width, height) / 48
    d.rectangle((3 * u, 3 * u, 22 * u, 19 * u), fill=(230, 20, 20))
    d.ellipse((37 * u, 5 * u, 59 * u, 27 * u), fill=(250, 230, 30))
    d.polygon([(10 * u, 45 * u), (26 * u, 26 * u), (35 * u, 45 * u)], fill=(20, 140, 40))
    d.rectangle((40 * u, 32 * u, 62 * u, 46 * u), fill=(245, 245, 245))
    return image


def texture(width, height):
    """Noise that is stronger in low frequencies, as photographs are."""
    random = np.random.default_rng(7)
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 6):
        small = random.standard_normal((2**octave, 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(small[:, :, channel]).resize((width, height), Image.BICUBIC)
            total[:, :, channel] += np.asarray(layer) / 1.4**octave
    return Image.fromarray(np.clip(128 + 70 * total, 0, 255).astype(np.uint8))


def pillow(fmt, image, **options):
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def ppm(image):
    return pillow("PPM", image)


def on_white(image):
    """RGB of an image, transparent pixels on white."""
    if image.mode in ("RGBA", "LA", "PA", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255,) * 4), rgba)
    return np.asarray(image.convert("RGB"))


def reference(data):
    """Pillow's pixels, upright."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return on_white(ImageOps.exif_transpose(image))


def tool(*command, stdin):
    """The output of a program; an error says what the program said."""
    done = subprocess.run(command, input=stdin, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[:200].decode()}")
    return done.stdout


def cjpeg(image, *options):
    return tool("cjpeg", "-quality", "92", *options, stdin=ppm(image))


def text_file(text):
    """A file that exists until the program ends."""
    file = tempfile.NamedTemporaryFile("w", delete=False)
    file.write(text)
    file.close()
    return file.name


def exif(orientation, big_endian=False):
    """A TIFF header and a directory with an orientation."""
    if big_endian:
        return b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)
    return b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + bytes([orientation]) + bytes(7)


def xmp(orientation, element=False):
    name = "tiff:Orientation"
    inner = f"><{name}>{orientation}</{name}></rdf:Description>" if element else f' {name}="{orientation}"/>'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{inner}</rdf:RDF></x:xmpmeta>'
    ).encode()


TURN_BACK = {
    1: None, 2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
    6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270,
}


def stored_turned(image, orientation):
    """The image as it is stored with this orientation."""
    back = TURN_BACK[orientation]
    return image if back is None else image.transpose(back)
