"""Comparisons with other packages, on the same problems and in the same run."""
