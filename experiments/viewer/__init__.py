"""The tree viewer: run folders to one page that needs nothing else."""
