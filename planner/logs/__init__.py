"""Boot logs of the engines: what was allocated, in the engine's own words. Imports nothing that plans."""
