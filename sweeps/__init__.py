"""Many runs of one command: grids of settings, where they run, and what came out together."""
