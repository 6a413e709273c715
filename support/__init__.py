"""What every other package uses: errors for the user, files that are complete, progress, seeds, options."""

import warnings

# From packages that compressai imports. No user of licq can mend them, and they would stand above all output.
warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=DeprecationWarning)
