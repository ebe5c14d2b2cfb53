"""A plan that is run: processes started, timed and stopped, and what they took set beside what was planned."""
