"""What a codec costs and how good its pixels are: metrics, BD-rate, anchors, reports."""
