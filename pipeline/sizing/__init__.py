"""Does it fit and how fast at best: pure functions of a geometry, weights, a card and an engine's facts."""
