"""Normalizing flows for Pyro: guides, reparameterizations and densities with exact log-determinants."""

from pyroflows import conditioners, distributions, encoders, flows, transforms, univariate
from pyroflows.amortised import AmortisedFlowVI
from pyroflows.calibration import Calibration, simulation_based_calibration
from pyroflows.density import fit_density
from pyroflows.distributions import ConditionalFlowDistribution, FlowDistribution
from pyroflows.evidence import compare
from pyroflows.guides import AutoFlow, AutoHierarchicalFlow
from pyroflows.inference import FlowVI
from pyroflows.posterior import FlowPosterior
from pyroflows.refinement import RefinedPosterior
from pyroflows.reparam import FlowReparam
from pyroflows.reversible import Reversible
from pyroflows.transform_module import (
    Compose,
    Conditioned,
    Inverse,
    Repeat,
    TransformModule,
    random_flow_module,
)

__version__ = "0.1.0"
__all__ = [
    "AmortisedFlowVI",
    "AutoFlow",
    "AutoHierarchicalFlow",
    "Calibration",
    "Compose",
    "ConditionalFlowDistribution",
    "Conditioned",
    "FlowDistribution",
    "FlowPosterior",
    "FlowReparam",
    "FlowVI",
    "Inverse",
    "RefinedPosterior",
    "Repeat",
    "Reversible",
    "TransformModule",
    "compare",
    "conditioners",
    "distributions",
    "encoders",
    "fit_density",
    "flows",
    "random_flow_module",
    "simulation_based_calibration",
    "transforms",
    "univariate",
]
