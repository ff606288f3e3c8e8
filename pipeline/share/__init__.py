"""The Hub: what may leave, publishing, pulling, making a published artifact again."""
