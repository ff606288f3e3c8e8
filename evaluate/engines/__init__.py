"""The engines that answer prompts, one module each."""
