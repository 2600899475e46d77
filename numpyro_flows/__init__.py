"""Normalizing flows for NumPyro: guides, reparameterizations and densities with exact log-determinants."""

from numpyro_flows import conditioners, distributions, encoders, flows, transforms, univariate
from numpyro_flows.amortised import AmortisedFlowVI
from numpyro_flows.calibration import Calibration, simulation_based_calibration
from numpyro_flows.density import fit_density
from numpyro_flows.distributions import ConditionalFlowDistribution, FlowDistribution
from numpyro_flows.evidence import compare
from numpyro_flows.guides import AutoFlow, AutoHierarchicalFlow
from numpyro_flows.inference import FlowVI
from numpyro_flows.posterior import FlowPosterior
from numpyro_flows.refinement import RefinedPosterior
from numpyro_flows.reparam import FlowReparam
from numpyro_flows.reversible import Reversible
from numpyro_flows.transform_module import (
    Compose,
    Conditioned,
    Inverse,
    Repeat,
    TransformModule,
    flow_module,
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
    "flow_module",
    "flows",
    "random_flow_module",
    "simulation_based_calibration",
    "transforms",
    "univariate",
]
