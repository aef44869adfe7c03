"""Implicit meta-learning (IML): inner training, a hypergradient, a step of φ, and again.

Online, T inner steps go on from where the last ones ended (warm start, Lorraine, Vicol & Duvenaud,
2020, algorithm 1); to convergence, θ is minimised anew for every φ (cold start).
"""

from weighmatch.studies.iml.hypergradients import gradient_memory
from weighmatch.studies.iml.settings import Training
from weighmatch.studies.iml.training import train

__all__ = ["Training", "gradient_memory", "train"]
