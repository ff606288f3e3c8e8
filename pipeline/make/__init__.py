"""A job: the outputs that one read of a source's weights makes, and how they reach the disk."""
