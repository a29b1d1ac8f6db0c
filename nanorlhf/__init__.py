"""nanorlhf: RLHF from scratch, one short script per method, on one model file and one data file."""

__version__ = "0.1.0"
