"""Looking at runs: one HTML page a run, runs laid over each other, and the live view in the terminal."""
