"""Builds the glf_fast distribution; metadata lives in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["glf_fast", "glf_fast.*"]),
    package_data={"glf_fast": ["py.typed", "presets/*.toml", "metrics/*.safetensors", "*.html"]},
)
