"""Jobs on a SLURM cluster."""
