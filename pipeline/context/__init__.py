"""Which parts of a repository to put before a model: read, cut into pieces, ranked for a question, chosen by budget."""
