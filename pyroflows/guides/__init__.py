"""Automatic guides made of flows."""

from pyroflows.guides.auto_flow import AutoFlow
from pyroflows.guides.hierarchical import AutoHierarchicalFlow

__all__ = ["AutoFlow", "AutoHierarchicalFlow"]
