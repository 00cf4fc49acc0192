"""Labelled images: a folder of classes, CIFAR's own binary files, or scikit-learn's handwritten digits.

What an epoch shows is a function of the seed, the epoch and the index of an image alone, whatever the number of
processes and workers, so that a run that was interrupted goes on with the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fused_resnet.cli import RequestError, load_benchmarks

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
Batch = tuple[Tensor, Tensor, int]  # images, labels, how many broken images were replaced


class Images(Dataset):
    """Labelled images, of which item i is (image, label, broken); `epoch` decides the augmentation."""

    seed = 0
    epoch: int | None = None  # None: as they are, for the test

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def rng(self, index: int) -> random.Random:
        return random.Random(f"{self.seed} {self.epoch} {index}")


class Pixels(Images):
    """Images in memory, (N, C, H, W); in training shifted by up to `shift` pixels, and mirrored where `mirror`."""

    def __init__(self, x: Tensor, labels: Sequence[int], shift: int, mirror: bool) -> None:
        super().__init__(labels)
        self.x, self.shift, self.mirror = x, shift, mirror

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        x = self.x[index]
        if self.epoch is not None:
            rng = self.rng(index)
            height, width = x.shape[1:]
            top, left = rng.randint(0, 2 * self.shift), rng.randint(0, 2 * self.shift)
            x = torch.nn.functional.pad(x, (self.shift,) * 4)[:, top : top + height, left : left + width]
            if self.mirror and rng.random() < 0.5:
                x = x.flip(2)
        return x, self.labels[index], 0


class Files(Images):
    """Image files; in training a random crop of 8 to 100% of the area, mirrored half the time. A broken file gives the
    next good one in its place, and is counted."""

    def __init__(self, files: Sequence[tuple[Path, int]], size: int) -> None:
        super().__init__([label for _, label in files])
        self.files, self.size = [path for path, _ in files], size

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        photographs = load_benchmarks("photographs")
        broken = 0
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            try:
                image = photographs.open_image(self.files[at])
                break
            except RequestError:
                broken = 1
        else:
            raise RequestError(f"none of {len(self)} images can be read, the first being {self.files[0]}")
        if self.epoch is not None:
            rng = self.rng(index)
            image = image.crop(photographs.random_box(*image.size, rng)).resize((self.size * 8 // 7,) * 2)
            x = photographs.preprocess(image, self.size)
            x = x.flip(2) if rng.random() < 0.5 else x
        else:
            x = photographs.preprocess(image, self.size)
        return x, self.labels[at], broken


class DataSet(NamedTuple):
    """What a run learns from: the two parts, the names of the classes, the channels of an image, and remarks."""

    train: Images
    test: Images
    classes: list[str]
    channels: int
    notes: list[str]


def load(source: str, size: int = 224) -> DataSet:
    """The data set: "digits", a folder of CIFAR's binary files, or a folder of classes.

    A folder holds a sub-folder of images for each class, or train/ and val/ (or test/) with such sub-folders; without
    the latter every tenth image is set aside for the test.

    Raises:
        RequestError: no such folder, an empty one, too few classes or images, files cut short.
    """
    if source == "digits":
        return _digits()
    root = Path(source)
    if not root.is_dir():
        raise RequestError(f"--data {source}: there is no such folder (nor is it 'digits')")
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-100-binary"):
        if (folder / "data_batch_1.bin").is_file():
            return _cifar(folder, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 10)
        if (folder / "train.bin").is_file():
            return _cifar(folder, ["train.bin"], "test.bin", 100)
    return _folder(root, size)


def _digits() -> DataSet:
    """1797 scans of handwritten digits, 8x8; every fourth is for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RequestError("--data digits needs scikit-learn: pip install 'fused_resnet[train]'") from error
    found = load_digits()
    x = torch.from_numpy(found.images).float().unsqueeze(1)
    test = torch.arange(len(x)) % 4 == 3
    x = (x - x[~test].mean()) / x[~test].std()
    y = torch.from_numpy(found.target)
    parts = [Pixels(x[part], y[part].tolist(), 1, False) for part in (~test, test)]
    return DataSet(parts[0], parts[1], [str(i) for i in range(10)], 1, [])


_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _cifar(folder: Path, train: list[str], test: str, classes: int) -> DataSet:
    """CIFAR-10's records are a label and 3072 pixels, CIFAR-100's a coarse and a fine label before them."""
    length = 3073 if classes == 10 else 3074

    def read(names: list[str]) -> Pixels:
        parts = []
        for name in names:
            path = folder / name
            try:
                raw = path.read_bytes()
            except OSError as error:
                raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
            if not raw or len(raw) % length:
                raise RequestError(f"{path} has {len(raw)} bytes, expected a multiple of {length}: it is cut short")
            parts.append(torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, length))
        records = torch.cat(parts)
        labels = records[:, length - 3073]
        if int(labels.max()) >= classes:
            raise RequestError(f"{folder}: a label is {int(labels.max())}, expected less than {classes}")
        x = records[:, -3072:].view(-1, 3, 32, 32).float() / 255
        x = (x - torch.tensor(_CIFAR_MEAN).view(3, 1, 1)) / torch.tensor(_CIFAR_STD).view(3, 1, 1)
        return Pixels(x, labels.tolist(), 4, True)

    names = folder / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt")
    known = names.read_text().split() if names.is_file() else [str(i) for i in range(classes)]
    return DataSet(read(train), read([test]), known, 3, [])


def _classes(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def _folder(root: Path, size: int) -> DataSet:
    held = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    split = (root / "train").is_dir() and held is not None
    folders = _classes(root / "train" if split else root)
    found = {folder.name: _images(folder) for folder in folders}
    empty = [name for name, files in found.items() if not files]
    found = {name: files for name, files in found.items() if files}
    if len(found) < 2:
        what = f"{len(found)} folder{'s' if len(found) != 1 else ''} with images"
        raise RequestError(
            f"--data {root}: expected a sub-folder of images for each of two classes or more, got {what}"
        )
    notes = [f"{len(empty)} classes without images were skipped: {', '.join(empty[:5])}"] if empty else []
    train, test = [], []
    for label, (name, files) in enumerate(found.items()):
        others = _images(held / name) if split and held is not None and (held / name).is_dir() else []
        if not split:
            others, files = files[9::10], [path for i, path in enumerate(files) if i % 10 != 9]
        train += [(path, label) for path in files]
        test += [(path, label) for path in others]
    if not test:
        raise RequestError(f"--data {root}: no image is left for the test: give val/, or ten images in a class")
    return DataSet(Files(train, size), Files(test, size), list(found), 3, notes)


class Batches(Sampler):
    """The batches of one process in one epoch, from batch `start` on: a shuffle that all processes share, whole
    batches only. Or, without a shuffle, every world-th image in order."""

    def __init__(
        self, count: int, batch: int, rank: int, world: int, order: torch.Generator | None, start: int
    ) -> None:
        self.count, self.batch, self.rank, self.world, self.order, self.start = count, batch, rank, world, order, start

    def __len__(self) -> int:
        if self.order is None:
            return -(-len(range(self.rank, self.count, self.world)) // self.batch)
        return self.count // (self.batch * self.world) - self.start

    def __iter__(self) -> Iterator[list[int]]:
        if self.order is None:
            own = list(range(self.rank, self.count, self.world))
            yield from (own[i : i + self.batch] for i in range(0, len(own), self.batch))
            return
        indices = torch.randperm(self.count, generator=self.order).tolist()
        for step in range(self.start, self.start + len(self)):
            first = (step * self.world + self.rank) * self.batch
            yield indices[first : first + self.batch]


def _collate(items: list[tuple[Tensor, int, int]]) -> Batch:
    x, y, broken = zip(*items, strict=True)
    return torch.stack(x), torch.tensor(y), sum(broken)


def loader(
    images: Images,
    batch: int,
    rank: int = 0,
    world: int = 1,
    *,
    seed: int = 0,
    epoch: int | None = None,
    start: int = 0,
    workers: int = 0,
) -> Any:
    """Batches of (images, labels, broken): shuffled and augmented for an epoch of training, or (None) in order."""
    images.seed, images.epoch = seed, epoch
    order = None if epoch is None else torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    batches = Batches(len(images), batch, rank, world, order, start)
    return DataLoader(images, batch_sampler=batches, num_workers=workers, collate_fn=_collate)
