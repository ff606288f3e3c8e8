"""The recipe: its sections and keys, its faults all at once, what its paths are relative to."""
