"""The lab: the paper's experiments in a world small enough for two CPU cores."""
