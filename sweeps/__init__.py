"""Many runs of one command: sweep files, their runs, and one summary of the results."""
