"""The layout rules: one module file at the root, CMake lists that equal the disk, imports in one direction."""

import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE_FILE = ROOT / "NMSWSegment.py"
LIBRARY = ROOT / "NMSWSegment"
LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
APPLICATION_PACKAGES = {"slicer", "qt", "ctk", "vtk"}
PANEL_FILES = {"panel.py", "rates.py", "run_state.py"}
DIRECT_PACKAGES = {"numpy", "SimpleITK", "torch", "NMSWSegment"} | set(sys.stdlib_module_names)


def imported_modules(path: Path, *, file_scope_only: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports, at any depth of its code or only when it is loaded."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if file_scope_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            if node.module == "NMSWSegment" or node.module.startswith("NMSWSegment."):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_for_slicer(path: Path) -> bool:
    """Whether a library file may touch the application; its name says so."""
    return path.name.startswith("slicer_")


def packages_of(modules: set[str]) -> set[str]:
    """Top-level names of modules."""
    return {name.partition(".")[0] for name in modules}


def cmake_list(name: str) -> list[str]:
    """Entries of a set(...) in the root CMake file."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    return re.search(rf"set\({name}\s(.*?)\)", text, flags=re.DOTALL).group(1).split()


def files_below(folder: str) -> list[str]:
    """Files of a folder as CMake names them."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def test_root_has_one_python_file_and_it_is_ascii():
    # Slicer loads every .py of a module folder as a module, and reads the file in the computer's own encoding
    assert [path.name for path in ROOT.glob("*.py")] == ["NMSWSegment.py"]
    assert MODULE_FILE.read_bytes().isascii()


def test_module_file_sets_its_path_first():
    body = ast.parse(MODULE_FILE.read_text(encoding="ascii")).body
    first = body[1]  # after the docstring
    assert isinstance(first, ast.Assign)
    assert first.targets[0].id == "__path__"


def test_module_file_has_the_version_of_the_package():
    # In Slicer the module file is the package, so the library reads its version there.
    versions = [re.search(r'^__version__ = "(.+?)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE).group(1) for path in (MODULE_FILE, LIBRARY / "__init__.py")]
    assert versions[0] == versions[1]


def test_cmake_scripts_equal_the_files_on_disk():
    assert sorted(cmake_list("MODULE_PYTHON_SCRIPTS")) == sorted(["NMSWSegment.py"] + [name for name in files_below("NMSWSegment") if name.endswith(".py")])


def test_cmake_resources_equal_the_files_on_disk():
    assert sorted(cmake_list("MODULE_PYTHON_RESOURCES")) == files_below("Resources")


def test_cmake_project_is_the_first_project_in_the_file():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert re.search(r"project\((\w+)", text).group(1) == "NMSWSegment"


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_library_imports_go_in_one_direction(path):
    modules = imported_modules(path)
    if not is_for_slicer(path):
        assert not {name for name in modules if name.startswith("NMSWSegment.slicer_")}
        assert not packages_of(modules) & APPLICATION_PACKAGES
    if path.name not in PANEL_FILES and not is_for_slicer(path):
        assert not {f"NMSWSegment.{Path(name).stem}" for name in PANEL_FILES} & modules


@pytest.mark.parametrize("path", sorted(LIBRARY.glob("*.py")), ids=lambda path: path.name)
def test_files_directly_in_the_library_need_no_monai(path):
    at_load = imported_modules(path, file_scope_only=True)
    allowed = DIRECT_PACKAGES | (APPLICATION_PACKAGES if is_for_slicer(path) else set())
    assert "monai" not in packages_of(imported_modules(path))
    assert packages_of(at_load) <= allowed
    assert not {name for name in at_load if name.split(".")[:2] in (["NMSWSegment", folder] for folder in ("nets", "training", "evaluation"))}


def test_protocol_imports_nothing_of_the_project():
    assert "NMSWSegment" not in packages_of(imported_modules(LIBRARY / "protocol.py"))


def test_module_file_imports_no_third_party_package_at_file_scope():
    packages = packages_of(imported_modules(MODULE_FILE, file_scope_only=True))
    assert packages <= APPLICATION_PACKAGES | {"NMSWSegment"} | set(sys.stdlib_module_names)


def test_panel_uses_only_widgets_of_the_ui_file():
    ui = ElementTree.parse(ROOT / "Resources" / "UI" / "NMSWSegment.ui")
    in_ui = {widget.get("name") for widget in ui.iter("widget")}
    used = set(re.findall(r"self\.ui\.(\w+)", MODULE_FILE.read_text()))
    assert used <= in_ui
    assert used


BOUND_BY_HAND = {"model", "device", "omittedStructures"}
"""Their lists depend on the computer or on the model."""


def test_parameter_names_of_the_ui_file_are_fields_of_the_parameter_node():
    ui = ElementTree.parse(ROOT / "Resources" / "UI" / "NMSWSegment.ui")
    bound = {prop.find("string").text for prop in ui.iter("property") if prop.get("name") == "SlicerParameterName"}
    fields = {
        item.target.id
        for node in ast.parse(MODULE_FILE.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "NMSWSegmentParameterNode"
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    }
    assert bound == fields - BOUND_BY_HAND
