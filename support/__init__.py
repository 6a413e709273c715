"""What every other package may lean on: errors for the user, safe files, progress."""

import warnings

# Raised by packages that compressai imports; no user of ours can mend it, and it would stand above every
# output.
warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=DeprecationWarning)
