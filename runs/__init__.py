"""What the commands do: a run and its folder, inputs, steps, bits of layers, evaluation runs, files."""
