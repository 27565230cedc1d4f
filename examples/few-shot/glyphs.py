"""Character images for few-shot classification: a glyph set made on the spot, and Omniglot.

Both sources give a `Characters`: a number of *characters* (the classes), each with the
same number of 28x28 images, and each belonging to an *alphabet*. Meta-training and
meta-testing use different alphabets, so a test episode shows writing systems that the
network has never seen.

The glyph set needs no download: matplotlib ships the DejaVu and STIX fonts, which cover
some twenty writing systems. Every image is one character in one of its fonts under a
random affine map. Omniglot is read from its own archives when their paths are given.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import unicodedata
import zipfile

import matplotlib
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIDE = 28

# Upright and slanted cuts only. True italics are left out: a Serif Italic Cyrillic "te"
# is drawn as a Latin "m", another character altogether.
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
)

# Alphabet -> code point ranges (both ends included). Where two alphabets share a shape
# (Latin A, Greek Alpha, Cyrillic A), the one listed first keeps it.
TRAIN_ALPHABETS = {
    "Latin": ((0x41, 0x2AF), (0x1D00, 0x1D7F), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF)),
    "Greek": ((0x370, 0x3FF),),
    "Cyrillic": ((0x400, 0x52F), (0xA640, 0xA69F)),
    "Canadian syllabics": ((0x1400, 0x167F),),
    "Arabic": ((0x600, 0x6FF), (0x750, 0x77F)),
    "Lao": ((0xE80, 0xEFF),),
    "Lisu": ((0xA4D0, 0xA4FF),),
    "Old Italic": ((0x10300, 0x1032F),),
    "Ogham": ((0x1680, 0x169F),),
    "Mathematical": ((0x2200, 0x22FF),),
}
TEST_ALPHABETS = {
    "Armenian": ((0x530, 0x58F),),
    "Georgian": ((0x10A0, 0x10FF), (0x2D00, 0x2D2F)),
    "Hebrew": ((0x590, 0x5FF),),
    "N'Ko": ((0x7C0, 0x7FF),),
    "Tifinagh": ((0x2D30, 0x2D7F),),
}

IMAGES_PER_CHARACTER = 20  # as in Omniglot
SAME_SHAPE = 0.9  # correlation of two blurred glyphs above which they count as one shape
_FORMAT = 1  # part of the cache key: raise it when rendering changes


@dataclasses.dataclass(frozen=True)
class Characters:
    """Images of characters, grouped by character and labelled by alphabet.

    Attributes:
        images: uint8 array (characters, images per character, 28, 28), strokes at 255.
        alphabets: name of the alphabet of each character.
        names: name of each character.
    """

    images: np.ndarray
    alphabets: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def of_alphabets(self, wanted) -> Characters:
        """Returns the characters that belong to one of the alphabets in `wanted`."""
        keep = [i for i, alphabet in enumerate(self.alphabets) if alphabet in wanted]
        return Characters(
            self.images[keep],
            tuple(self.alphabets[i] for i in keep),
            tuple(self.names[i] for i in keep),
        )

    def summary(self) -> str:
        """Returns the number of characters of each alphabet as one line of text."""
        counts: dict[str, int] = {}
        for alphabet in self.alphabets:
            counts[alphabet] = counts.get(alphabet, 0) + 1
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        return f"{len(self)} characters ({listed})"


# ------------------------------------------------------------------------- glyph set


class _Fonts:
    """The fonts of `FONTS`, with what each of them really covers."""

    def __init__(self, size: int = 96):
        folder = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
        paths = [folder / name for name in FONTS if (folder / name).exists()]
        if not paths:
            raise FileNotFoundError(f"none of the fonts {FONTS} is in {folder}")
        # A character outside the cmap would be drawn as .notdef (a box), silently.
        self._covered = [frozenset(TTFont(path, lazy=True).getBestCmap()) for path in paths]
        self._fonts = [
            ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC) for path in paths
        ]

    def draw(self, code: int) -> list[Image.Image]:
        """Draws one character in every font that has it, each cropped to its ink."""
        images = []
        for covered, font in zip(self._covered, self._fonts):
            if code not in covered:
                continue
            left, top, right, bottom = font.getbbox(chr(code))
            if right <= left or bottom <= top:
                continue  # a blank such as the ogham space mark
            canvas = Image.new("L", (right - left + 8, bottom - top + 8))
            ImageDraw.Draw(canvas).text((4 - left, 4 - top), chr(code), fill=255, font=font)
            ink = canvas.getbbox()
            if ink is not None:
                images.append(canvas.crop(ink))
        return images


def _codes(ranges) -> list[int]:
    """Lists the letters (or mathematical symbols) of some ranges that stand for themselves.

    Modifier letters are small copies of letters, and whatever has a decomposition is a
    letter plus an accent or a variant of another one: neither is a shape of its own.
    """
    codes = []
    for first, last in ranges:
        for code in range(first, last + 1):
            kind = unicodedata.category(chr(code))
            if kind in ("Lu", "Ll", "Lo", "Sm") and not unicodedata.decomposition(chr(code)):
                codes.append(code)
    return codes


def _warp(glyph: Image.Image, matrix: np.ndarray, shift: np.ndarray, longest: float) -> np.ndarray:
    """Maps a cropped glyph into a 28x28 image.

    Args:
        glyph: image whose ink touches all four edges.
        matrix: linear map applied to the glyph about its centre.
        shift: where the centre goes, in pixels from the middle of the image.
        longest: length of the longer side of the mapped glyph's bounding box, in pixels.

    Returns:
        A uint8 array, SIDE x SIDE.
    """
    over = 3  # draw three times too large and average: bilinear sampling alone would alias
    half = np.array(glyph.size) / 2
    scale = longest / (2 * np.abs(matrix) @ half).max()
    # Pillow asks for the inverse: where in the glyph an output pixel comes from.
    inverse = np.linalg.inv(matrix * scale * over)
    offset = half - inverse @ (over * (SIDE / 2 + shift))
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    large = glyph.transform(
        (SIDE * over, SIDE * over), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(large.reduce(over))


def _random_view(glyph: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Draws a glyph under a random rotation, shear, stretch, size and shift."""
    angle = np.deg2rad(rng.uniform(-15, 15))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1.0, rng.uniform(-0.3, 0.3)], [rng.uniform(-0.1, 0.1), 1.0]])
    stretch = np.diag(np.exp(rng.uniform(-0.2, 0.2, size=2)))
    longest = rng.uniform(17, 24)
    return _warp(glyph, rotation @ shear @ stretch, rng.uniform(-2, 2, size=2), longest)


def _distinct(shapes: np.ndarray) -> list[int]:
    """Lists the shapes that look like none of the shapes kept before them.

    Args:
        shapes: uint8 array (n, SIDE, SIDE), one upright drawing of each character.
    """
    # A light blur forgives a pixel of difference in stroke width or position.
    blurred = shapes.astype(np.float32)
    for axis in (1, 2):
        blurred = (np.roll(blurred, 1, axis) + 2 * blurred + np.roll(blurred, -1, axis)) / 4
    flat = blurred.reshape(len(shapes), -1)
    flat = flat - flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    alike = flat @ flat.T > SAME_SHAPE
    kept: list[int] = []
    for i in range(len(shapes)):
        if not alike[i, kept].any():
            kept.append(i)
    return kept


def render_glyphs(seed: int = 0) -> Characters:
    """Draws the whole glyph set (ten seconds on one core)."""
    fonts, rng = _Fonts(), np.random.default_rng(seed)
    drawn, shapes, alphabets, names = [], [], [], []
    for alphabet, ranges in {**TRAIN_ALPHABETS, **TEST_ALPHABETS}.items():
        for code in _codes(ranges):
            styles = fonts.draw(code)
            if styles:
                drawn.append(styles)
                shapes.append(_warp(styles[0], np.eye(2), np.zeros(2), 22))
                alphabets.append(alphabet)
                names.append(unicodedata.name(chr(code)).lower())
    kept = _distinct(np.stack(shapes))
    images = np.empty((len(kept), IMAGES_PER_CHARACTER, SIDE, SIDE), np.uint8)
    for row, i in enumerate(tqdm(kept, desc="drawing glyphs", unit="char", leave=False, disable=None)):
        order = rng.permutation(len(drawn[i]))  # every style once before any style twice
        for k in range(IMAGES_PER_CHARACTER):
            images[row, k] = _random_view(drawn[i][order[k % len(order)]], rng)
    return Characters(images, tuple(alphabets[i] for i in kept), tuple(names[i] for i in kept))


def load_glyphs(cache: str | os.PathLike) -> tuple[Characters, Characters]:
    """Returns the glyph set as (meta-train, meta-test), drawn on first use and then cached.

    Args:
        cache: folder for the cached file; made if missing.
    """
    recipe = (_FORMAT, FONTS, TRAIN_ALPHABETS, TEST_ALPHABETS, IMAGES_PER_CHARACTER, SAME_SHAPE)
    key = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    path = pathlib.Path(cache, f"glyphs-{key}.npz")
    characters = _cached(path, render_glyphs)
    return characters.of_alphabets(TRAIN_ALPHABETS), characters.of_alphabets(TEST_ALPHABETS)


# -------------------------------------------------------------------------- Omniglot


def read_omniglot(archive: str | os.PathLike) -> Characters:
    """Reads one Omniglot archive: a zip of <alphabet>/<character>/<image>.png."""
    pages: dict[tuple[str, str], list[np.ndarray]] = {}
    with zipfile.ZipFile(archive) as zipped:
        for name in tqdm(sorted(zipped.namelist()), desc=f"reading {archive}", leave=False, disable=None):
            parts = name.split("/")
            if not name.endswith(".png") or len(parts) < 3 or parts[0] == "__MACOSX":
                continue
            page = Image.open(io.BytesIO(zipped.read(name))).convert("L")
            page = page.resize((SIDE, SIDE), Image.Resampling.BOX)
            # Omniglot is black on white; the network sees strokes as ones.
            pages.setdefault((parts[-3], parts[-2]), []).append(255 - np.asarray(page))
    if not pages:
        raise ValueError(f"{archive} holds no <alphabet>/<character>/<image>.png")
    count = min(len(images) for images in pages.values())
    return Characters(
        np.stack([np.stack(images[:count]) for images in pages.values()]),
        tuple(alphabet.replace("_", " ") for alphabet, _ in pages),
        tuple(character for _, character in pages),
    )


def load_omniglot(archives, cache: str | os.PathLike, seed: int = 0) -> tuple[Characters, Characters]:
    """Returns Omniglot as (meta-train, meta-test).

    Args:
        archives: path of `images_background.zip`, and of `images_evaluation.zip` if at
            hand. With one archive, a fifth of its alphabets is held out.
        cache: folder for the arrays read from the archives.
        seed: chooses the held-out alphabets.
    """
    sets = []
    for archive in archives:
        stat = os.stat(archive)
        key = hashlib.sha256(repr((_FORMAT, stat.st_size, stat.st_mtime_ns)).encode()).hexdigest()[:12]
        path = pathlib.Path(cache, f"{pathlib.Path(archive).stem}-{key}.npz")
        sets.append(_cached(path, lambda archive=archive: read_omniglot(archive)))
    if len(sets) == 2:
        return sets[0], sets[1]
    alphabets = sorted(set(sets[0].alphabets))
    if len(alphabets) < 2:
        raise ValueError("one alphabet cannot be split into meta-training and meta-testing")
    shuffled = np.random.default_rng(seed).permutation(alphabets)
    held_out = max(1, len(alphabets) // 5)
    return sets[0].of_alphabets(shuffled[held_out:]), sets[0].of_alphabets(shuffled[:held_out])


def _cached(path: pathlib.Path, make) -> Characters:
    """Loads characters from `path`, or makes them and stores them there."""
    if path.exists():
        with np.load(path) as stored:
            return Characters(stored["images"], tuple(stored["alphabets"]), tuple(stored["names"]))
    characters = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        np.savez_compressed(
            file, images=characters.images, alphabets=characters.alphabets, names=characters.names
        )
    os.replace(partial, path)  # a reader never meets half a file
    return characters
