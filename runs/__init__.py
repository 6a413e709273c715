"""What the commands do: a run and its folder, its inputs, its steps, the bits of its layers, evaluation runs, files."""
