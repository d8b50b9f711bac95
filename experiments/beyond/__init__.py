"""What goes beyond the published figures: the best recipe found for the small-batch network."""
