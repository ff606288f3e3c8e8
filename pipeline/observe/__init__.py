"""A running server: its metrics beside the plan, and which limit binds."""
