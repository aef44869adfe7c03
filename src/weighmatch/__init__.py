"""WeighMatch: FixMatch that learns which unlabelled images to trust."""

__version__ = "0.1.0"
