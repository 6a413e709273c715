"""The integer program: what a frozen codec computes, as a list of operations on integers."""
