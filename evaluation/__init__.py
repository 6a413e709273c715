"""Measures of a codec: metrics, BD-rate, curves to compare with, one codec on a set of images."""
