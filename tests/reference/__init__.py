"""The plain NumPy oracle: what the engine must compute, written to be read, not to be fast."""
