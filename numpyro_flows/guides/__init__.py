"""Automatic guides made of flows."""

from numpyro_flows.guides.auto_flow import AutoFlow
from numpyro_flows.guides.hierarchical import AutoHierarchicalFlow

__all__ = ["AutoFlow", "AutoHierarchicalFlow"]
