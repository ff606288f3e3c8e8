"""What the runtimes ask of an artifact, as rules with their source."""
