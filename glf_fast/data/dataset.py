"""Data sets in memory: one tensor for a whole split, with its kind, name, split and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from glf_fast.errors import UserError

__all__ = [
    "CONTENTS",
    "SPLITS",
    "Dataset",
    "ImageDataset",
    "Kind",
    "TableDataset",
    "TokenDataset",
    "as_images",
    "check_split",
    "split_off_test",
]

SPLITS = ("train", "test")

Kind = Literal["images", "table", "tokens"]
# A data set's kind in words, for messages: "iris.csv holds rows of a table".
CONTENTS: dict[Kind, str] = {"images": "images", "table": "rows of a table", "tokens": "token sequences"}


@dataclass(frozen=True)
class Dataset:
    """A whole split in memory. Each kind of data set is a subclass.

    Attributes:
        name: name of a public data set, or path of the user's file or folder.
        split: "train" or "test".
        items: tensor (N, *shape) with all items of the split, on the CPU.
        labels: class of each item, int64 (N,), or None.
        fingerprint: SHA-256 of the shape, the policy and the items. Runs and cached statistics are tied to it.
        policy: processing of the files (crop, resize, split), in words.
        kind: "images", "table" or "tokens".
    """

    kind: ClassVar[Kind]

    name: str
    split: str
    items: Tensor
    labels: Tensor | None
    fingerprint: str
    policy: str = ""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one item."""
        return tuple(self.items.shape[1:])


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Images: uint8 `items` (N, C, H, W), C = 1 or 3.

    Attributes:
        names: name of each image's file, or its place in an array that both splits are parts of; () if the images of a split
            are numbered from 0.
    """

    kind = "images"
    names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        split: str,
        images: Tensor,
        labels: Tensor | None = None,
        policy: str = "",
        names: Sequence[str] = (),
    ) -> ImageDataset:
        """Check the images and compute their fingerprint."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise UserError(
                f"{name} must hold uint8 images (N, 1 or 3, H, W), N ≥ 1; got {images.dtype} {tuple(images.shape)}"
            )
        labels = _checked_labels(name, images, labels)
        return cls(name, split, images, labels, _fingerprint(images, policy), policy, tuple(names))

    @property
    def images(self) -> Tensor:
        """The items: uint8 (N, C, H, W)."""
        return self.items


@dataclass(frozen=True)
class TableDataset(Dataset):
    """Rows of features: finite float32 `items` (N, D) as in the file; nothing is standardised on loading.

    Attributes:
        columns: the D names of the features, or () if the file has no names.
    """

    kind = "table"
    columns: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        split: str,
        rows: Tensor,
        labels: Tensor | None = None,
        policy: str = "",
        columns: Sequence[str] = (),
    ) -> TableDataset:
        """Check the rows and compute their fingerprint."""
        if rows.dtype != torch.float32 or rows.ndim != 2 or 0 in rows.shape:
            raise UserError(f"{name} must hold float32 rows (N, D), N ≥ 1, D ≥ 1; got {rows.dtype} {tuple(rows.shape)}")
        if not bool(rows.isfinite().all()):
            raise UserError(f"{name} holds NaN or infinite values; drop these rows or fill the values in")
        if columns and len(columns) != rows.shape[1]:
            raise UserError(f"{name} has {rows.shape[1]} columns but {len(columns)} column names")
        labels = _checked_labels(name, rows, labels)
        return cls(name, split, rows, labels, _fingerprint(rows, policy), policy, tuple(columns))

    @property
    def mean(self) -> Tensor:
        """Mean of each feature over this split, float32 (D,)."""
        # numpy sums in one thread, so the result has the same bits on any number of cores.
        return torch.from_numpy(self.items.numpy().mean(0, dtype=np.float64).astype(np.float32))

    @property
    def std(self) -> Tensor:
        """Standard deviation of each feature over this split, float32 (D,); 1 for a constant feature.

        A model standardises by (x − train.mean) / train.std, and keeps mean and std in its buffers, so that they are saved
        with the model.
        """
        std = torch.from_numpy(self.items.numpy().std(0, dtype=np.float64).astype(np.float32))
        constant = self.items.amin(0) == self.items.amax(0)  # exact, where a computed deviation may be 1e-17
        return torch.where(constant | (std == 0), 1.0, std)


@dataclass(frozen=True)
class TokenDataset(Dataset):
    """Token sequences: int64 `items` (N, L) of indices into a vocabulary, padded on the right to one length L.

    Attributes:
        vocabulary: the V tokens, in the order of their indices.
        padding: index of the token that fills up short sequences. This token occurs nowhere else.
        grammar: text of the grammar of the sequences, see `grammar.Grammar.of`; "" if they have none.
        objective: name of the number by which sequences are judged, see `metrics.objectives`; "" if there is none.
    """

    kind = "tokens"
    vocabulary: tuple[str, ...] = ()
    padding: int = 0
    grammar: str = ""
    objective: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        split: str,
        tokens: Tensor,
        vocabulary: Sequence[str],
        padding: int = 0,
        labels: Tensor | None = None,
        policy: str = "",
        grammar: str = "",
        objective: str = "",
    ) -> TokenDataset:
        """Check the sequences and compute their fingerprint, which covers vocabulary, padding and grammar."""
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or 0 in tokens.shape:
            raise UserError(
                f"{name} must hold int64 tokens (N, L), N ≥ 1, L ≥ 1; got {tokens.dtype} {tuple(tokens.shape)}"
            )
        repeated = [token for i, token in enumerate(vocabulary) if token in vocabulary[:i]]
        if repeated:
            raise UserError(f"the vocabulary of {name} holds {repeated[0]!r} twice")
        if not 0 <= padding < len(vocabulary):
            raise UserError(f"padding of {name} must be an index in 0 … {len(vocabulary) - 1}; got {padding}")
        wrong = (tokens < 0) | (tokens >= len(vocabulary))
        if bool(wrong.any()):
            row, position = wrong.nonzero()[0].tolist()
            raise UserError(
                f"{name}: sequence {row} has token {int(tokens[row, position])} at position {position}; "
                f"the vocabulary has indices 0 … {len(vocabulary) - 1}"
            )
        resumed = (tokens[:, :-1] == padding) & (tokens[:, 1:] != padding)
        if bool(resumed.any()):
            row, position = resumed.nonzero()[0].tolist()
            raise UserError(
                f"{name}: sequence {row} has padding ({padding}) at position {position} and further tokens behind it; "
                "padding belongs at the end of a sequence"
            )
        fingerprint = _fingerprint(tokens, f"{policy} {list(vocabulary)} {padding}{grammar}")
        labels = _checked_labels(name, tokens, labels)
        return cls(name, split, tokens, labels, fingerprint, policy, tuple(vocabulary), padding, grammar, objective)

    @property
    def lengths(self) -> Tensor:
        """Length of each sequence without its padding, int64 (N,)."""
        return (self.items != self.padding).sum(1)


def as_images(dataset: Dataset) -> ImageDataset:
    """The same data set, typed as a data set of images; raises UserError for a table or token sequences."""
    if not isinstance(dataset, ImageDataset):
        raise UserError(f"{dataset.name} holds {CONTENTS[dataset.kind]}; images are needed")
    return dataset


def check_split(split: str) -> None:
    """Raise UserError unless the split is "train" or "test"."""
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")


def split_off_test(name: str, items: Tensor, labels: Tensor | None, split: str) -> tuple[Tensor, Tensor | None]:
    """The split of a source without a test split: a tenth (rounded up) of a fixed random order is "test", the rest "train".

    Both splits keep the order of the files. Raises UserError, which names the source, for fewer than two items.
    """
    n = len(items)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    test = -(-n // 10)
    chosen = (order[n - test :] if split == "test" else order[: n - test]).sort().values
    if not len(chosen):
        raise UserError(f"{name} holds {n} item(s); at least two are needed")
    return items[chosen], None if labels is None else labels[chosen]


def _checked_labels(name: str, items: Tensor, labels: Tensor | None) -> Tensor | None:
    if labels is not None and len(labels) != len(items):
        raise UserError(f"{name} holds {len(items)} items but {len(labels)} labels")
    return labels


def _fingerprint(items: Tensor, policy: str) -> str:
    digest = hashlib.sha256(f"{tuple(items.shape)} {policy}".encode())
    digest.update(items.contiguous().numpy().data)
    return digest.hexdigest()
