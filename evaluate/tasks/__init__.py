"""Benchmarks: readers, prompts, extraction of programs from replies."""
