"""Python library code as benchmark text: the standard library to calibrate on, other packages to be judged on.

    python scripts/bench_text.py OUT_DIR MODEL_DIR

writes calibration.jsonl, heldout.jsonl and the very tokens, calibration_tokens.safetensors (int64 ``[64, 512]``), so
that a peer quantizes with what qtool quantizes with.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

from safetensors.torch import save_file

from qtool.convert.text.source import TextSource
from qtool.convert.text.tokenizer import load_tokenizer
from qtool.convert.text.windows import token_windows

CALIBRATION = ("asyncio", "email", "http", "json", "logging", "unittest", "xml", "importlib", "concurrent")
HELDOUT = ("rich", "click", "pydantic", "huggingface_hub")  # under site-packages


def collect(root: Path, packages: tuple[str, ...]) -> list[str]:
    """Source files of at least 1500 characters, in a fixed order."""
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in paths if "test" not in path.name]
    return [text for text in texts if len(text) >= 1500]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", type=Path)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    for name, root, packages in (
        ("calibration", Path(sysconfig.get_path("stdlib")), CALIBRATION),
        ("heldout", Path(sysconfig.get_path("purelib")), HELDOUT),
    ):
        texts = collect(root, packages)
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = TextSource(text=str(out / "calibration.jsonl"), samples=64, length=512)
    tokens = token_windows(source, load_tokenizer(options.model))
    save_file({"tokens": tokens}, out / "calibration_tokens.safetensors")
    print(f"{out}: {tuple(tokens.shape)} calibration tokens")


if __name__ == "__main__":
    main()
