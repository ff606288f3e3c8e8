"""GGUF: header, metadata, vocabulary, types, importance matrices and what goes beside the file."""
