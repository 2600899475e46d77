"""Automatic guides made of flows."""

from numpyro_flows.guides.auto_flow import AutoFlow

__all__ = ["AutoFlow"]
