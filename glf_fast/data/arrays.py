"""The user's .npy and .npz files: images, rows of a table, or token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glf_fast.data.dataset import SPLITS, Dataset, ImageDataset, TableDataset, TokenDataset, split_off_test
from glf_fast.data.tables import rows_from
from glf_fast.errors import UserError

__all__ = ["load_arrays", "read_arrays"]

# Names in a .npz of the items of a split, and of items without splits. `load_arrays` has the names of labels.
SPLIT_NAMES = ("{split}", "{split}_images", "x_{split}")
WHOLE_NAMES = ("images", "rows", "tokens", "x")
# Arrays that describe the items.
ABOUT_ITEMS = ("labels", "y", "vocabulary", "padding", "columns")


def load_arrays(path: Path, split: str) -> Dataset:
    """A split of the arrays in a .npy or .npz file.

    The array decides what the file holds:

    * images: uint8 (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W);
    * rows of a table: numbers (N, D), converted to float32. `columns` beside them may name the features;
    * token sequences: integers (N, L) in a .npz that also holds `vocabulary`, V strings. `padding` is the index of the token
      that fills up short sequences, 0 by default.

    A .npz may hold `train` and `test` (or `train_images`/`test_images`, `x_train`/`x_test`), or one array (called `images`,
    `rows`, `tokens` or `x` if there are other arrays). Labels (`train_labels`, `y_train`, `labels`) are read if the file has
    them. Without a test array, a tenth of the items, in a fixed random order, is the test split.

    Raises:
        UserError: object arrays, which hide pickles; shapes or types that fit no kind above; NaN; arrays that are missing or
            ambiguous; a damaged file.
    """
    arrays = read_arrays(path)
    halves = {half: _first(arrays, [pattern.format(split=half) for pattern in SPLIT_NAMES]) for half in SPLITS}
    name = halves[split]
    if name is not None:
        labels = _labels(path, arrays, (f"{split}_labels", f"y_{split}"))
        return _dataset(path, split, arrays, name, labels, whole=False)
    if any(halves.values()):
        raise UserError(
            f"{path} holds {', '.join(arrays)} but no array {split!r}; add this array, or rename the other array to 'x' to "
            "have a tenth of it split off for testing"
        )
    candidates = [key for key in arrays if key not in ABOUT_ITEMS]
    name = _first(arrays, WHOLE_NAMES) or (candidates[0] if len(candidates) == 1 else None)
    if name is None:
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'no arrays'}; name the arrays 'train' and 'test', or name one array "
            f"{' or '.join(map(repr, WHOLE_NAMES))}"
        )
    return _dataset(path, split, arrays, name, _labels(path, arrays, ("labels", "y")), whole=True)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, or the array of a .npy file, called "rows" if it has two dimensions, else "images".

    Raises:
        UserError: a damaged file, or pickled objects.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            return {"rows" if file.ndim == 2 else "images": file}
        with file:
            arrays = {name: file[name] for name in file.files}
            if foreign := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"its member {foreign[0]} is no array")
            return arrays
    except (
        Exception
    ) as error:  # numpy, zipfile and zlib raise whatever they run into, MemoryError for sizes that are not true
        if isinstance(error, OSError) and not path.is_file():
            raise
        raise UserError(
            f"{path} cannot be read as plain numpy arrays ({str(error)[:200]}); pickled objects are never loaded, "
            "because they can execute code; save numbers with numpy.save"
        ) from error


def _dataset(
    path: Path, split: str, arrays: dict[str, np.ndarray], name: str, labels: Tensor | None, *, whole: bool
) -> Dataset:
    """The array called `name` as a data set; `whole` says that the array holds both splits."""
    array, where = arrays[name], f"{path} ({name})"
    policy = f"array {name}"
    if array.ndim == 2 and "vocabulary" in arrays:
        items = _tokens(where, array)
    elif array.ndim == 2:
        items = rows_from(where, array)
    else:
        items = _images(where, array)
    if labels is not None and len(labels) != len(items):
        raise UserError(f"{where} holds {len(items)} items but {len(labels)} labels")
    names: Sequence[str] = ()
    if whole:
        names = [str(place) for place in split_off_test(str(path), torch.arange(len(items)), None, split)[0].tolist()]
        items, labels = split_off_test(str(path), items, labels, split)
        policy += "; test: a tenth of a fixed random order"
    if array.ndim != 2:
        return ImageDataset.of(str(path), split, items, labels, policy, names)
    if "vocabulary" in arrays:
        padding = arrays.get("padding", np.array(0))
        if padding.ndim or padding.dtype.kind not in "iu":
            raise UserError(f"{path}: padding must be one integer, the index of a token; got {padding!r}")
        vocabulary = _strings(path, "vocabulary", arrays)
        return TokenDataset.of(str(path), split, items, vocabulary, int(padding), labels, policy)
    columns = _strings(path, "columns", arrays) if "columns" in arrays else ()
    return TableDataset.of(str(path), split, items, labels, policy, columns)


def _first(arrays: dict[str, np.ndarray], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in arrays), None)


def _labels(path: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> Tensor | None:
    name = _first(arrays, names)
    if name is None:
        return None
    array = arrays[name]
    whole = array.dtype.kind in "iufb" and (array == np.round(array)) & (np.abs(array.astype(np.float64)) < 2**63)
    if not np.all(whole):
        raise UserError(f"{path} ({name}) holds {array.dtype} that are not class numbers; rename or remove the array")
    return torch.from_numpy(array.astype(np.int64).reshape(-1))


def _strings(path: Path, name: str, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    array = arrays[name]
    if array.ndim != 1 or array.dtype.kind != "U":
        raise UserError(f"{path}: {name} must be a list of strings; got {array.dtype} of shape {array.shape}")
    return tuple(array.tolist())


def _tokens(where: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "iu":
        raise UserError(f"{where} holds {array.dtype}; tokens are integers, indices into the vocabulary")
    return torch.from_numpy(array.astype(np.int64))


def _images(where: str, array: np.ndarray) -> Tensor:
    if array.ndim not in (3, 4):
        raise UserError(
            f"{where} has shape {array.shape}; images are (N, H, W), (N, H, W, 1|3) or (N, 1|3, H, W), "
            "and rows of a table are (N, D)"
        )
    if array.dtype != np.uint8:
        raise UserError(
            f"{where} holds {array.dtype}, images must be uint8: (x * 255).round().astype('uint8') "
            "turns floats in [0, 1] into pixels"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.shape[1] not in (1, 3):
        raise UserError(
            f"{where} has shape {array.shape}; images have 1 or 3 channels: (N, H, W, 1|3) or (N, 1|3, H, W)"
        )
    return torch.from_numpy(np.ascontiguousarray(array))
