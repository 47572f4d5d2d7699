"""Run a peer's convert_hf_to_gguf.py on a model with an unknown tokenizer.

    python bench/convert_gguf.py PATH/convert_hf_to_gguf.py MODEL --outtype bf16 --outfile OUT

The converter identifies tokenizers by a hash. The hash of a random model is not in its list; this script
treats the tokenizer as DeepSeek-V3's.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Load the script, patch one method, and run it."""
    script = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(script.parent))  # llama.cpp's script imports a package in its own folder
    spec = importlib.util.spec_from_file_location("converter", script)
    assert spec is not None and spec.loader is not None
    converter = importlib.util.module_from_spec(spec)
    sys.modules["converter"] = converter
    sys.argv = sys.argv[1:]
    spec.loader.exec_module(converter)
    homes = [m for name, m in list(sys.modules.items()) if name.split(".")[0] in ("converter", "conversion")]
    for item in [item for home in homes for item in vars(home).values()]:
        if isinstance(item, type) and "get_vocab_base_pre" in vars(item):
            item.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"  # type: ignore[attr-defined]
    converter.main()


if __name__ == "__main__":
    main()
