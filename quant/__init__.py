"""The way to a smaller checkpoint. Empty for now: the planner came first."""
