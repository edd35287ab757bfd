"""Images in .npy and .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glf_fast.data.dataset import ImageDataset, split_off_test
from glf_fast.errors import UserError

__all__ = ["load_arrays"]


def load_arrays(path: Path, split: str) -> ImageDataset:
    """uint8 images from a .npy file, or from a .npz with train/test arrays or one array.

    Shapes (N, H, W), (N, H, W, 1 or 3) and (N, 1 or 3, H, W) are understood. A .npz may hold `train` and `test` (or
    `train_images`/`test_images`, `x_train`/`x_test`), or `images`, or a single array; labels beside them (`train_labels`,
    `y_train`, `labels`) are read when they are there. Without a test array, a tenth of a fixed random order is the test split.

    Raises:
        UserError: floats, objects, shapes that are not images, arrays that are missing or ambiguous, a damaged file.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            arrays = {"images": file}
        else:
            with file:
                arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and not path.is_file():
            raise
        raise UserError(f"{path} cannot be read as plain numpy arrays ({error}); save it with numpy.save") from error
    found = _first(arrays, (split, f"{split}_images", f"x_{split}"))
    if found is not None:
        labels = _labels(arrays, (f"{split}_labels", f"y_{split}"))
        images, policy = _images(path, found, arrays[found]), f"array {found}"
    else:
        found = _first(arrays, ("images", "x")) or (next(iter(arrays)) if len(arrays) == 1 else None)
        if found is None:
            raise UserError(f"{path} holds {', '.join(arrays)}; name the images 'train' and 'test', or 'images'")
        images, labels = split_off_test(_images(path, found, arrays[found]), _labels(arrays, ("labels", "y")), split)
        policy = f"array {found}; test: a tenth of a fixed random order"
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{path} holds {len(images)} images but {len(labels)} labels")
    return ImageDataset.of(str(path), split, images, labels, policy)


def _first(arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in arrays), None)


def _labels(arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> Tensor | None:
    name = _first(arrays, names)
    return None if name is None else torch.from_numpy(arrays[name].astype(np.int64).reshape(-1))


def _images(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8:
        raise UserError(
            f"{path} ({name}) holds {array.dtype}, images must be uint8: (x * 255).round().astype('uint8') "
            "turns floats in [0, 1] into pixels"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in (1, 3):
        raise UserError(
            f"{path} ({name}) has shape {array.shape}; images are (N, H, W), (N, H, W, 1|3) or (N, 1|3, H, W)"
        )
    return torch.from_numpy(np.ascontiguousarray(array))
