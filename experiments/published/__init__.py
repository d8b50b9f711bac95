"""One file per published result: its source, its figures, the run, and whether it was reproduced."""
