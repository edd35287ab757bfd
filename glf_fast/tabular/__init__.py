"""Densities of the rows of a table: `TableDensity`, which `python -m glf_fast.fit` fits to a file."""

from glf_fast.tabular.density import TableDensity

__all__ = ["TableDensity"]
