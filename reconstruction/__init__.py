"""Reconstruction of quantized codecs: units, targets, caches, the driver, presets."""
