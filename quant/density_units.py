"""Units and sizes of the tables of `quant.density`. Reading them takes no torch."""

LEVELS = 192
NORMAL_BITS = 30
STEP_BITS = 8
"""The table of the normal distribution has a value every 2^-8 standard deviations,"""
REACH = 8
"""up to so many."""
INVERSE_BITS = 20
FACTORIZED_BITS = 20
POINT_BITS = 3
"""The distribution functions of z have a value every 2^-3."""
