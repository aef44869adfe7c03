"""Sources of images, splits and contamination. NumPy alone."""
