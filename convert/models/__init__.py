"""What architectures are: one module a family, one table."""
