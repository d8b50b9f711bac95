"""One file per reproduced result, and what they share: data, networks, run folders. See `python -m experiments`."""
