"""What every other package may lean on: errors for the user, safe files, progress."""
