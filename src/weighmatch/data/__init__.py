"""Sources of images, splits and contamination. NumPy alone: nothing here imports torch."""
