"""Tokens a second, latency and memory of a model in an engine, beside what the plan bounds."""
