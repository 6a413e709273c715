"""Images in: loading and refusing, data sets by name, calibration crops."""
