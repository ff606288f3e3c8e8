"""Calibration text and tokenizers: records, templates, windows of tokens."""
