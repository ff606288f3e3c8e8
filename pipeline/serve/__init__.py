"""Models behind real servers: started as planned, watched, and proved against the reference."""
