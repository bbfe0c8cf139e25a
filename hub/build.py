"""Builds a repository for the Hugging Face hub: `make hub`, or `python hub/build.py FOLDER`.

The repository's `custom_generate/generate.py` works without the package: the modules that it needs lie beside it, unchanged.
transformers finds them by their import statements, `from .name import ...`, and by nothing else.
"""

import configparser
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What `generate()` does not reach: the package's door, many streams, reading texts, checking models.
LEFT_OUT = {
    "__init__",
    "batch",
    "merge_kernel",
    "pool",
    "sampling",
    "streaming",
    "turns",
    "verify",
}


def build(folder: Path) -> None:
    """Makes the repository anew in `folder`; a repository's `.git` there stays."""
    code = folder / "custom_generate"
    shutil.rmtree(code, ignore_errors=True)
    code.mkdir(parents=True)
    for module in (ROOT / "sink_cache").glob("*.py"):
        if module.stem not in LEFT_OUT:
            shutil.copy(module, code)
    shutil.copy(ROOT / "hub" / "generate.py", code)
    shutil.copy(ROOT / "hub" / "README.md", folder)
    shutil.copy(ROOT / "LICENSE", folder)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (code / "requirements.txt").write_text(setup["options"]["install_requires"].strip() + "\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: a repository for the hub")
