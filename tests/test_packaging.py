"""What a user gets: the wheel has the typed library and nothing else, and the source distribution all that its tests need."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import sink_cache

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
    required = {line.split(">")[0] for line in metadata.get_all("Requires-Dist")}
    assert required == {"torch", "transformers"}
    assert "Provides-Extra" not in metadata  # benchmarks and tests are not in the wheel
    assert metadata["Version"] == sink_cache.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_tests_run_from_the_source_distribution(tmp_path: Path) -> None:
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.png")
    shutil.copytree(ROOT, source, ignore=left_out)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("sink_cache-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()

    for folder in ("benchmarks", "docs", "examples", "hub", "tests"):
        files = {path.relative_to(source) for path in (source / folder).rglob("*") if path.is_file()}
        assert files == {path.relative_to(unpacked) for path in (unpacked / folder).rglob("*") if path.is_file()}
    # These read the README, docs, results and the benchmarks.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_report.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(unpacked), *sys.path])}
    result = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
