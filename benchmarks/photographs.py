"""Real input: seeded crops of photographs, preprocessed as ImageNet's evaluation does. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import math
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import RequestError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The photographs among the images that scikit-image's wheel ships.
SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "camera.png")


def _needs(package: str, what: str) -> RequestError:
    return RequestError(f"{what} needs {package}, which is not installed: pip install 'fused_resnet[bench]'")


def open_image(path: str | Path) -> Any:
    """The file as a PIL image in RGB.

    Raises:
        RequestError: no such file, not an image, damaged, or too large.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise _needs("pillow", "reading photographs") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = file.convert("RGB")
    except UnidentifiedImageError as error:
        raise RequestError(f"{path} is not an image that pillow can read") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} has too many pixels: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise RequestError(f"{path} cannot be read: {reason}") from error
    except Exception as error:  # pillow's decoders raise many types on damaged files
        raise RequestError(f"{path} cannot be read as an image: {error}") from error
    if max(image.size) > 64 * min(image.size):
        raise RequestError(f"{path} is too narrow to be a photograph: {image.width} x {image.height} pixels")
    return image


def bundled() -> dict[str, Any]:
    """name -> RGB image: the photographs that come with scikit-learn and, where it is installed, scikit-image."""
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        package = "pillow" if error.name == "PIL" else "scikit-learn"
        raise _needs(package, "the default input, photographs that come with scikit-learn,") from error
    samples = load_sample_images()
    found = {
        Path(name).name: Image.fromarray(pixels) for name, pixels in zip(samples.filenames, samples.images, strict=True)
    }
    spec = importlib.util.find_spec("skimage")
    for root in (spec.submodule_search_locations if spec else None) or ():
        for name in SKIMAGE:
            path = Path(root) / "data" / name
            if path.is_file():
                found[name] = open_image(path)
    return found


def random_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """A random-resized crop (Szegedy et al. 2015): 8 to 100% of the area, aspect ratio 3/4 to 4/3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def preprocess(image: Any, size: int = 224) -> Tensor:
    """(3, size, size) as in ImageNet's evaluation: shorter side to size * 256 / 224, centre crop, normalise."""
    import numpy as np
    from PIL import Image

    resized = round(size * 256 / 224)
    width, height = image.size
    short = min(width, height)
    image = image.resize((width * resized // short, height * resized // short), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1).contiguous()


def crops(images: Sequence[Any], count: int, size: int = 224, seed: int = 0) -> Tensor:
    """`count` preprocessed crops, (count, 3, size, size): each image whole, then seeded random crops in turn."""
    rng = random.Random(seed)
    taken = []
    for index in range(count):
        image = images[index % len(images)]
        if index >= len(images):
            image = image.crop(random_box(*image.size, rng))
        taken.append(preprocess(image, size))
    return torch.stack(taken)
