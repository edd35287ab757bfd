"""Flows of public projects, built of the same layers: what the conversion tests and `python -m bench.projects` go through."""

from __future__ import annotations

from bench.projects import of_freia, of_nflows, of_normflows, of_zuko
from bench.projects.project import SMALL, TRUE_SIZE, Project

__all__ = ["PROJECTS", "SMALL", "TRUE_SIZE", "Project"]

PROJECTS = {project.name: project for file in (of_freia, of_nflows, of_normflows, of_zuko) for project in file.PROJECTS}
