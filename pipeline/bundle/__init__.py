"""The files beside an artifact that start it, watch it and load it, from its plan and from its engine's facts."""
