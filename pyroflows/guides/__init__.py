"""Automatic guides made of flows."""

from pyroflows.guides.auto_flow import AutoFlow

__all__ = ["AutoFlow"]
