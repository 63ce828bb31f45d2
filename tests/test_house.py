"""The walls of the house: what is packaged, what an import costs, what must not appear in the source."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "mmzoo": ROOT / "mmzoo",
    "mmzoo_kernels": ROOT / "kernels" / "mmzoo_kernels",
    "mmzoo_training": ROOT / "training" / "mmzoo_training",
    "mmzoo_eval": ROOT / "eval" / "mmzoo_eval",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_python(code: str, *paths: Path) -> str:
    """Run code from the repository root, which is then first on sys.path, as in a notebook or with `python -c`."""
    places = [*paths, *(folder.parent for folder in PACKAGES.values() if folder.parent != ROOT)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    env.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def package_files(suffix: str = "") -> set[str]:
    """The files of the four packages as a wheel names them."""
    return {
        (Path(name) / path.relative_to(folder)).as_posix()
        for name, folder in PACKAGES.items()
        for path in folder.rglob(f"*{suffix}")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # From a copy: a build leaves folders beside the source, and takes what an earlier one left there.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ["mmzoo", "kernels", "training", "eval"]:
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ["pyproject.toml", "LICENSE", "README.md"]:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = ["pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    done = subprocess.run([sys.executable, "-m", *command, str(source)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


@pytest.mark.parametrize("folder", ["kernels", "training", "eval", "scripts", "model_cards"])
def test_the_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_wheel_holds_exactly_the_four_packages(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == set(PACKAGES)


def test_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    missing = package_files() - packed
    assert not missing, "a folder without __init__.py, or a kind of file that package-data does not name"
    assert packed == package_files()


def test_every_package_is_typed() -> None:
    assert package_files("py.typed") == {f"{name}/py.typed" for name in PACKAGES}


def test_hub_package_named_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """A folder `kernels` with an `__init__.py` would make every transformers model unusable."""
    from transformers.utils import import_utils

    version = import_utils.KERNELS_MIN_VERSION
    package, metadata = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(
        "from unittest.mock import MagicMock\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return MagicMock(name=name)\n"
    )
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    code = (
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert is_kernels_available(), 'the stand-in is not taken for the Hub package, so this proves nothing'\n"
        "from transformers import LlamaForCausalLM\n"
        "import kernels\n"
        "print(kernels.__file__)\n"
    )
    assert run_python(code, tmp_path).strip() == str(package / "__init__.py")


def test_import_is_light() -> None:
    """What torch itself loads is not ours to answer for."""
    code = (
        "import sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "import mmzoo\n"
        "print(*set(sys.modules) - before, sep='\\n')\n"
    )
    loaded = set(run_python(code).split())
    heavy = {
        "av",
        "decord",
        "diffusers",
        "flash_attn",
        "lightning",
        "matplotlib",
        "open_clip",
        "peft",
        "pytorch_lightning",
        "timm",
        "torchvision",
        "transformers",
        "triton",
    }
    assert "mmzoo" in loaded
    assert not {name.split(".")[0] for name in loaded} & heavy
    with_triton = {
        name.removesuffix(".py").replace("/", ".")
        for name in package_files(".py")
        if name.startswith("mmzoo_kernels/") and "triton" in _imports_at_the_top(name)
    }
    assert not loaded & with_triton


def _imports_at_the_top(name: str) -> set[str]:
    package, _, rest = name.partition("/")
    found: set[str] = set()
    for node in ast.parse((PACKAGES[package] / rest).read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_one_version() -> None:
    import mmzoo

    version = PROJECT["version"]
    assert mmzoo.__version__ == version
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_is_on_the_package_page() -> None:
    assert (PROJECT.get("readme") == "README.md") == (ROOT / "README.md").exists()


def _unsafe_loads(tree: ast.AST) -> list[int]:
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {(node.module or "").split(".")[0]}
        else:
            modules = set()
        if modules & {"pickle", "cloudpickle", "dill", "joblib"}:
            lines.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            lines.append(node.lineno)
        if keywords.get("allow_pickle", "False") != "False":
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    ("code", "unsafe"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(\n    path,\n    weights_only=True,\n)", False),
        ("import pickle", True),
        ("np.load(path, allow_pickle=True)", True),
        ("safetensors.torch.load_file(path)", False),
    ],
)
def test_unsafe_loads_are_seen(code: str, unsafe: bool) -> None:
    assert bool(_unsafe_loads(ast.parse(code))) is unsafe


def test_nothing_is_unpickled() -> None:
    folders = [*PACKAGES.values(), ROOT / "scripts"]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        for line in _unsafe_loads(ast.parse(path.read_text()))
    ]
    assert not found


def _pages(nav: list | dict | str) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    return {page for part in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(part)}


def test_the_generated_tables_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import tables

    for name, page in tables.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"run python scripts/tables.py: docs/{name} is stale"


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    docs = ROOT / "docs"
    assert _pages(nav) == {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}


def test_tests_use_no_network() -> None:
    with socket.socket() as outward, pytest.raises(RuntimeError, match="no network"):
        outward.connect(("192.0.2.1", 80))
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def test_uninitialised_memory_shows() -> None:
    code = "a, b, c = torch.empty(3), torch.empty_like(x), x.new_empty(2)\nd = torch.empty(3, dtype=torch.int64)"
    ours = {"__name__": "mmzoo.somewhere", "torch": torch, "x": torch.zeros(2)}
    exec(code, ours)
    assert all(ours[name].isnan().all() for name in "abc")
    assert (ours["d"] > 2**60).all()

    with torch.device("meta"):
        assert torch.empty(3).is_meta
