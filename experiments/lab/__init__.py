"""The norm lab: every norm at every batch size, its rate tuned like the others', on two networks and any images."""
