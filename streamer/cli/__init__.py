"""The `ripcurrent` command: one file a command group; flags, progress bars and printing, and nothing else."""
