"""The containers: how codes and scales lie in files, one module each."""
