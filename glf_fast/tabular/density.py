"""A density of the rows of a table, in the table's own units, and the folder in which it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glf_fast import seeds
from glf_fast.errors import UserError
from glf_fast.flow import Flow
from glf_fast.models import saving
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.reference import Spline
from glf_fast.settings import as_table, check, converted, table, updated
from glf_fast.tabular.columns import Column, decoded, encoded
from glf_fast.tabular.univariate import UnivariateFlow

__all__ = ["TableDensity"]

FORMAT = 1
ROWS = 1 << 14  # of a call of the flow


class TableDensity:
    """p(columns) or p(columns | context columns) of the rows of a table: a flow and the columns' maps to it.

    Args:
        settings: of the flow. One column has a `UnivariateFlow`, of as many steps.
        columns: those that have a density, in the order in which `log_prob` takes their values.
        context: those that are given.
        table: names of all columns of the table that the density was fitted to, in order.

    Example:
        >>> density = TableDensity(FlowSettings(), [Column("height", mean=170, std=9), Column("weight", mean=70, std=12)])
        >>> density.log_prob(np.array([[175.0, 75.0], [140.0, 110.0]])).shape
        (2,)
        >>> density.sample(3).shape
        (3, 2)
    """

    def __init__(
        self,
        settings: FlowSettings,
        columns: Sequence[Column],
        context: Sequence[Column] = (),
        table: Sequence[str] = (),
    ) -> None:
        self.settings, self.columns, self.context = settings, tuple(columns), tuple(context)
        self.table = tuple(table) or tuple(column.name for column in (*columns, *context))
        self.flow = _flow(settings, len(self.columns), len(self.context)).eval()

    # -- the density -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_prob(self, values: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        """log p(values | context) in nats per row, (N,) in float64, of the values' own units.

        A row that has a value on or beyond a bound has −∞, and so has one whose values or context are too far away for
        float32. For a discrete column this is the density of the value with noise.

        Args:
            values: (N, D), in the order of `columns`.    context: (N, C), in the order of `context`, if it is not empty.

        Raises:
            ValueError: other shapes, or NaN.
        """
        values = self._checked("values", values, self.columns)
        z, logdet = encoded(self.columns, values)
        given, reachable = self._encoded_context(context, len(values))
        device = next(self.flow.parameters()).device
        log_prob = np.empty(len(z))
        for start in range(0, len(z), ROWS):
            rows = slice(start, start + ROWS)
            c = None if given is None else given[rows].to(device)
            log_prob[rows] = self.flow.log_prob(torch.from_numpy(z[rows]).to(device), c).double().cpu().numpy()
        return np.where(reachable, log_prob + logdet, -math.inf)

    def sample(self, n: int, context: np.ndarray | None = None, *, seed: int = 0, noisy: bool = False) -> np.ndarray:
        """n rows (n, D) in float64, in the order of `columns`.

        Args:
            context: (n, C), a row a sample, or (C,) for all samples.
            seed: of the noise.
            noisy: do not round discrete columns.

        Raises:
            ValueError: a context of another shape, with NaN, or too far away for float32.
        """
        if context is not None and np.ndim(context) == 1:
            context = np.broadcast_to(context, (n, len(self.context)))
        given, reachable = self._encoded_context(context, n)
        if not reachable.all():
            raise ValueError(f"context holds values that are too large for float32 in row {np.argmin(reachable)}")
        device = next(self.flow.parameters()).device
        generator = seeds.generator(seed, "samples", device=device)
        z = torch.empty(n, len(self.columns))
        for start in range(0, n, ROWS):
            c = None if given is None else given[start : start + ROWS].to(device)
            z[start : start + ROWS] = self.flow.sample(min(ROWS, n - start), c, generator=generator)
        values = decoded(self.columns, z.numpy())
        return values if noisy else np.stack([c.rounded(values[:, i]) for i, c in enumerate(self.columns)], 1)

    def _encoded_context(self, context: np.ndarray | None, n: int) -> tuple[torch.Tensor | None, np.ndarray]:
        """The context for the flow, and whether each row's (n,) is near enough for float32."""
        if not self.context:
            if context is not None:
                raise ValueError("this density takes no context, but one was given")
            return None, np.ones(n, bool)
        if context is None:
            names = ", ".join(column.name for column in self.context)
            raise ValueError(f"this density is conditional: give a context with the columns {names}")
        context = self._checked("context", context, self.context)
        if len(context) != n:
            raise ValueError(f"context has {len(context)} rows, but there are {n} rows of values")
        z, logdet = encoded(self.context, context)
        return torch.from_numpy(z), np.isfinite(logdet)

    def _checked(self, name: str, values: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != len(columns):
            raise ValueError(f"{name} must have shape (rows, {len(columns)}); got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds NaN or infinity in row {np.argwhere(~np.isfinite(values))[0][0]}")
        return values

    # -- the folder --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors and config.json into a folder."""
        config = {
            "table_density": FORMAT,
            "flow": table(self.settings),
            "columns": [table(column) for column in self.columns],
            "context": [table(column) for column in self.context],
            "table": list(self.table),
        }
        with saving.beside(Path(folder)) as temporary:
            saving.write(temporary, config, self.flow.state_dict())

    @classmethod
    def load(cls, folder: Path | str) -> TableDensity:
        """The density that `save` wrote. No code in the folder is executed; the global random numbers do not change.

        Raises:
            UserError: files that are missing, damaged or something else.
        """
        folder = Path(folder)
        config, weights = saving.read(folder)
        where = str(folder / saving.CONFIG_FILE)
        if config.get("table_density") != FORMAT:
            raise UserError(f"{where} is not that of a density of a table; python -m glf_fast.fit TABLE writes one")
        try:
            settings = updated(FlowSettings(), as_table(config["flow"], where, "flow"), where, "flow.")
            check(settings, "flow.")
            columns, context = (
                [_column(entry, where, f"{part}.") for entry in config[part]] for part in ("columns", "context")
            )
            names = converted(config["table"], tuple[str, ...], where, "table")
            if not columns or not {column.name for column in (*columns, *context)} <= set(names):
                raise UserError(f"{where}: columns and context must be columns of the table")
            with torch.random.fork_rng(devices=[]):
                density = cls(settings, columns, context, names)
        except (KeyError, TypeError) as error:
            raise UserError(f"{where} is damaged ({error!r}); restore it from a copy") from error
        saving.load_weights(density.flow, weights, folder)
        return density


def _column(entry: Any, where: str, prefix: str) -> Column:
    column = updated(Column(), as_table(entry, where, prefix.rstrip(".")), where, prefix)
    check(column, prefix)
    return column


def _flow(settings: FlowSettings, dim: int, context_dim: int) -> Flow:
    if dim > 1:
        return settings.build(dim, context_dim)
    if settings.kind != "coupling" or settings.coupling != "spline":
        raise UserError(
            'the density of one column is made of splines; choose flow.kind "coupling" and flow.coupling "spline"'
        )
    spline = Spline(bins=settings.bins, low=-settings.bound, high=settings.bound)
    return UnivariateFlow(settings.steps, settings.hidden, context_dim, spline)
