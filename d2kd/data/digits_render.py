"""Draws one image of the digits dataset: handwritten digits on crops of photographs.

Everything random comes from the generator passed in, so an image depends on nothing but its seed.
Letters: H, W an image's height and width, h, w those of a drawn piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

Rng = np.random.Generator

# `train` and `val` share no scan: the file's first scans serve one, the last ones the other
# (neighbours often share a writer). They share no pixel of a photograph either: each is cut in two
# through its subject, so that both parts hold some of everything.
SCANS_FOR_TRAIN = 1437
TRAIN_COLUMNS = {"china.jpg": slice(210, 640), "flower.jpg": slice(0, 333)}
VAL_COLUMNS = {"china.jpg": slice(0, 210), "flower.jpg": slice(333, 640)}

LARGEST_SIDE = 0.5  # of the image's side
MIN_VISIBLE = 0.6  # of a digit's pixels: no later piece and no image border may hide more
MIN_PIXELS = 10  # of a digit's mask
COVERED = 0.5  # opacity from which a pixel belongs to a piece
GRID = 80  # side of the enlarged scan, px


@dataclass(frozen=True)
class Look:
    """How hard it is to find the digits."""

    smallest_side: float = 16  # px; readable at a stride of 4
    least_contrast: float = 60  # mean difference from the surroundings, of 255
    most_digits: int = 8  # in an image; at least 2
    most_clutter: int = 2


PLAIN = Look(smallest_side=28, least_contrast=100, most_digits=5, most_clutter=0)


@dataclass(frozen=True)
class Material:
    """What the images of one split are made of."""

    scans: list[np.ndarray]  # (8, 8) float32 in [0, 1]
    classes: list[int]
    photographs: list[np.ndarray]  # (H, W, 3) uint8
    look: Look

    @staticmethod
    def load(split: str, look: Look) -> Material:
        """Scans and photograph regions of `split`, "train" or "val"; the two share nothing."""
        digits = load_digits()
        train = split == "train"
        part = slice(None, SCANS_FOR_TRAIN) if train else slice(SCANS_FOR_TRAIN, None)
        columns = TRAIN_COLUMNS if train else VAL_COLUMNS
        photographs = [load_sample_image(name)[:, columns[name]] for name in sorted(columns)]
        scans = (digits.images[part] / 16.0).astype(np.float32)
        return Material(list(scans), digits.target[part].tolist(), photographs, look)


def render_image(
    rng: Rng, material: Material, size: int, with_digits: bool = True
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """
    Args:
        size: H and W, px.
        with_digits: False draws the background and the clutter only.

    Returns:
        image (H, W, 3) uint8 RGB, and `(class, visible mask (H, W) bool)` per digit.
    """
    scene = _Scene(_background(rng, material, size))
    look = material.look
    kinds = [True] * int(rng.integers(2, look.most_digits + 1) if with_digits else 0)
    kinds += [False] * int(rng.integers(0, look.most_clutter + 1))
    for is_digit in rng.permutation(kinds):
        side = _side(rng, look, size)
        if is_digit:
            index = int(rng.integers(len(material.scans)))
            alpha = _draw(rng, material.scans[index], side, max_tilt=14)
            _place(rng, scene, alpha, material.classes[index], material)
        elif rng.random() < 0.75:
            alpha = _draw(rng, _lookalike(rng, material), side, max_tilt=25)
            _place(rng, scene, alpha, None, material)
        else:
            _place(rng, scene, _blob(rng, side), None, material)
    return _photograph(rng, scene.canvas), scene.digits()


class _Scene:
    """The picture so far, and which digit owns which pixel."""

    def __init__(self, canvas: np.ndarray):
        self.canvas = canvas  # (H, W, 3) float32, 0..255
        self.owner = np.full(canvas.shape[:2], -1, dtype=np.int16)
        self.classes: list[int] = []
        self.full_pixels: list[int] = []  # before anything is hidden

    def hides_too_much(self, covered: np.ndarray) -> bool:
        """Whether a piece that covers `covered` (H, W) leaves some digit mostly hidden."""
        left = np.bincount(self.owner[~covered] + 1, minlength=len(self.classes) + 1)[1:]
        return bool((left < MIN_VISIBLE * np.array(self.full_pixels)).any())

    def digits(self) -> list[tuple[int, np.ndarray]]:
        return [(label, self.owner == i) for i, label in enumerate(self.classes)]


def _side(rng: Rng, look: Look, size: int) -> float:
    """Log-uniform, so that each octave of sizes is equally frequent."""
    return float(np.exp(rng.uniform(np.log(look.smallest_side), np.log(LARGEST_SIDE * size))))


def _draw(rng: Rng, scan: np.ndarray, side: float, max_tilt: float) -> np.ndarray:
    """Enlarges an 8x8 scan smoothly. Returns opacity (h, w) in [0, 1], the longer side ~ `side`."""
    grey = cv2.resize(np.pad(scan, 1), (GRID, GRID), interpolation=cv2.INTER_CUBIC)
    level, softness = rng.uniform(0.46, 0.64), rng.uniform(0.1, 0.2)
    ink = _smoothstep((grey - level) / (2 * softness) + 0.5)
    rows, columns = np.nonzero(ink > 0.5)
    if len(rows) == 0:
        return np.zeros((1, 1), np.float32)
    extent = max(np.ptp(rows), np.ptp(columns)) + 1
    center = np.array([np.ptp(columns) / 2 + columns.min(), np.ptp(rows) / 2 + rows.min()])

    # Drawn `fine` times larger and then averaged: strokes of small digits stay anti-aliased.
    fine = max(1, round(GRID / side))
    n = int(np.ceil(side * 1.6)) + 2
    tilt, shear = np.deg2rad(rng.uniform(-max_tilt, max_tilt)), rng.uniform(-0.2, 0.2)
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    rotate = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    shape = np.array([[stretch, shear], [0, 1 / stretch]])
    linear = rotate @ shape * (side * fine / extent)
    target = fine * (n / 2 + rng.uniform(-0.5, 0.5, 2))
    transform = np.column_stack([linear, target - linear @ center])
    large = cv2.warpAffine(ink, transform, (n * fine, n * fine), flags=cv2.INTER_LINEAR)
    return _trim(cv2.resize(large, (n, n), interpolation=cv2.INTER_AREA))


def _lookalike(rng: Rng, material: Material) -> np.ndarray:
    """Pen strokes (8, 8) that are no digit.

    Either a scan lying on its side, of a class that is nothing like a digit then; or quarters of
    four scans, upside down each, so that what curved around the middle curves away from it and no
    loop closes, and laid on the side, so that no upright stroke is taken for a 1.
    """
    chosen = rng.integers(len(material.scans), size=4)
    if material.classes[chosen[0]] in (3, 4, 7):
        return np.rot90(material.scans[chosen[0]], int(rng.choice([1, 3]))).copy()
    scan = np.zeros((8, 8), np.float32)
    for quarter, index in enumerate(chosen):
        row, column = (slice(4 * part, 4 * part + 4) for part in divmod(quarter, 2))
        scan[row, column] = material.scans[index][row, column][::-1, ::-1]
    return np.rot90(scan).copy()


def _blob(rng: Rng, side: float) -> np.ndarray:
    """A smooth random patch. Returns opacity (n, n)."""
    n = max(8, round(side))
    noise = cv2.resize(rng.random((5, 5), dtype=np.float32), (n, n), interpolation=cv2.INTER_CUBIC)
    across = np.linspace(-1, 1, n, dtype=np.float32)
    dome = 1 - across[:, None] ** 2 - across[None, :] ** 2
    return _trim(_smoothstep((noise + dome - 0.9) * 4 + 0.5))


def _trim(alpha: np.ndarray) -> np.ndarray:
    """The crop that holds all visible opacity, with a margin that leaves room for a shadow."""
    rows, columns = np.nonzero(alpha > 0.02)
    if len(rows) == 0:
        return np.zeros((1, 1), np.float32)
    crop = alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.pad(crop, 2 + max(crop.shape) // 8)


def _place(
    rng: Rng, scene: _Scene, alpha: np.ndarray, label: int | None, material: Material
) -> None:
    """Paints a piece where it hides no digit too much; gives up after some tries.

    `label` is the digit's class, None for clutter.
    """
    full_pixels = int((alpha > COVERED).sum())
    if full_pixels < MIN_PIXELS:
        return
    size = scene.canvas.shape[0]
    for _ in range(12):
        top, left = _corner(rng, scene, alpha.shape)
        rows = slice(max(top, 0), min(top + alpha.shape[0], size))
        columns = slice(max(left, 0), min(left + alpha.shape[1], size))
        inside = alpha[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]
        visible = int((inside > COVERED).sum())
        if visible < max(MIN_PIXELS, 0.75 * full_pixels):
            continue
        covered = np.zeros(scene.owner.shape, bool)
        covered[rows, columns] = inside > COVERED
        if scene.hides_too_much(covered):
            continue
        _paint(rng, scene.canvas[rows, columns], inside, material)
        scene.owner[covered] = -1 if label is None else len(scene.classes)
        if label is not None:
            scene.classes.append(label)
            scene.full_pixels.append(full_pixels)
        return


def _corner(rng: Rng, scene: _Scene, shape: tuple[int, int]) -> tuple[int, int]:
    """Top-left corner of a new piece: anywhere, or close to a digit, so that pieces overlap."""
    size = scene.canvas.shape[0]
    if scene.classes and rng.random() < 0.2:
        rows, columns = np.nonzero(scene.owner == int(rng.integers(len(scene.classes))))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.0)
        y = rows.min() + height / 2 + np.sin(angle) * reach * (height + shape[0]) / 2
        x = columns.min() + width / 2 + np.cos(angle) * reach * (width + shape[1]) / 2
    else:
        y, x = rng.uniform(0, size, 2)
    return round(float(y - shape[0] / 2)), round(float(x - shape[1] / 2))


def _paint(rng: Rng, canvas: np.ndarray, alpha: np.ndarray, material: Material) -> None:
    """Blends a piece of opacity `alpha` (h, w) into `canvas` (h, w, 3), in place."""
    surroundings = np.average(canvas.reshape(-1, 3), axis=0, weights=alpha.ravel() + 1e-6)
    ink = _contrasting_colour(rng, material.look, surroundings)
    ramp = _ramp(rng, alpha.shape)
    fill = ink + ramp[..., None] * rng.normal(0, 14, 3).astype(np.float32)
    if rng.random() < 0.3:
        texture = _crop(rng, material, alpha.shape).astype(np.float32)
        fill = fill + rng.uniform(0.2, 0.6) * (texture - texture.mean(axis=(0, 1)))
    if rng.random() < 0.25:  # a soft shadow, or a halo
        shadow = cv2.GaussianBlur(alpha, (0, 0), max(0.6, 0.03 * max(alpha.shape)))
        canvas += (shadow * rng.uniform(0.2, 0.7))[..., None] * (
            np.float32(rng.choice([0, 255])) - canvas
        )
    opacity = (alpha * np.float32(rng.uniform(0.8, 1.0)))[..., None]
    canvas += opacity * (np.clip(fill, 0, 255) - canvas)


def _contrasting_colour(rng: Rng, look: Look, colour: np.ndarray) -> np.ndarray:
    """A colour (3,) at a log-uniform distance, from the least to full contrast."""
    distance = np.exp(rng.uniform(np.log(look.least_contrast), np.log(190)))
    direction = rng.normal(0, 1, 3) + rng.choice([-1.5, 1.5])  # mostly lighter or darker
    step = distance * direction / np.linalg.norm(direction) * np.sqrt(3)
    options = [np.clip(colour + step, 0, 255), np.clip(colour - step, 0, 255)]
    # Where clipping eats the contrast, the opposite direction is taken.
    best = max(options, key=lambda option: float(np.abs(option - colour).sum()))
    first_suffices = np.abs(options[0] - colour).mean() > 0.6 * distance
    return (options[0] if first_suffices else best).astype(np.float32)


def _background(rng: Rng, material: Material, size: int) -> np.ndarray:
    """A recoloured crop of a photograph, sometimes two blended. Returns (size, size, 3) float32."""
    canvas = _crop(rng, material, (size, size)).astype(np.float32)
    if rng.random() < 0.3:
        other = _crop(rng, material, (size, size)).astype(np.float32)
        canvas += rng.uniform(0.3, 0.6) * (other - canvas)
    if rng.random() < 0.3:
        canvas = canvas[..., rng.permutation(3)]
    canvas *= rng.uniform(0.7, 1.25, 3).astype(np.float32)
    return np.clip(canvas, 0, 255)


def _crop(rng: Rng, material: Material, shape: tuple[int, int]) -> np.ndarray:
    """A random part of a photograph, mirrored at random, resized to `shape`. (h, w, 3) uint8."""
    photograph = material.photographs[int(rng.integers(len(material.photographs)))]
    side = int(rng.integers(80, min(photograph.shape[1], 300) + 1))
    top = int(rng.integers(photograph.shape[0] - side + 1))
    left = int(rng.integers(photograph.shape[1] - side + 1))
    crop = photograph[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    shrinks = side > max(shape)
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(crop), shape[::-1], interpolation=method)


def _photograph(rng: Rng, canvas: np.ndarray) -> np.ndarray:
    """Brightness, contrast, blur and noise of a cheap camera. Returns (H, W, 3) uint8."""
    image = (canvas - 128) * np.float32(rng.uniform(0.7, 1.25)) + 128 + rng.uniform(-25, 25)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + noise * np.float32(rng.uniform(0, 9))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _ramp(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    """A linear gradient from -1 to 1 in a random direction, (h, w)."""
    angle = rng.uniform(0, 2 * np.pi)
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None, :]
    return np.float32(np.sin(angle)) * y + np.float32(np.cos(angle)) * x


def _smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)
