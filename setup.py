"""Metadata lives in pyproject.toml; here only what it cannot say."""

from setuptools import setup

setup()
