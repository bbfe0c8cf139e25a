"""What a user installs: the wheel has the typed library, and nothing that belongs to the checkout."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_holds_the_typed_library_and_nothing_else(tmp_path: Path) -> None:
    # In a copy: setuptools leaves build/ behind, and later builds would pick up files that were deleted since.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "sink_cache", source / "sink_cache", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "benchmarks").mkdir()
    (source / "benchmarks" / "__init__.py").touch()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True, capture_output=True)

    (wheel,) = tmp_path.glob("sink_cache-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())

    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == {f"sink_cache/{path.name}" for path in (ROOT / "sink_cache").iterdir() if path.is_file()}
    assert "sink_cache/py.typed" in installed
    assert any(name.endswith("/LICENSE") for name in names)
    assert metadata["Name"] == "sink-cache"
    required = {line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"torch", "transformers"}
