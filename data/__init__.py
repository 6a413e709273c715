"""Image files, data sets by name, and calibration crops."""
