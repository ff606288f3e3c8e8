"""What a person reads: terminal, HTML, Markdown, figures, the model card."""
