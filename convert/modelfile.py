"""An Ollama Modelfile for a .gguf file. Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.md"""

from __future__ import annotations

from collections.abc import Sequence

CHATML = """{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{- range .Messages }}{{- if ne .Role "system" }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}{{- end }}<|im_start|>assistant
"""


def modelfile(file: str, chat_template: str | None, stops: Sequence[str]) -> str:
    """``FROM``, the template in Ollama's own language where the chat template is ChatML (the marks `<|im_start|>` and
    `<|im_end|>`), and where to stop. Any other template is left to Ollama, which knows many from the .gguf file.
    """
    lines = [f"FROM ./{file}"]
    if chat_template and "<|im_start|>" in chat_template and "<|im_end|>" in chat_template:
        lines.append(f'TEMPLATE """{CHATML}"""')
        stops = [*dict.fromkeys([*stops, "<|im_end|>"])]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]  # Ollama's parser knows no escapes
    return "\n".join([*lines, "PARAMETER temperature 0"]) + "\n"
