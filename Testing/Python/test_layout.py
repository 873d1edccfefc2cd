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
ROOMS = {
    "": {"files"},
    "files": set(),
    "engine": {"files"},
    "panel": {"files", "engine"},
    "data": {"files"},
    "samples": {"files", "engine", "data"},
    "nets": set(),
    "training": {"files", "engine", "data", "samples", "nets"},
    "cohort": {"files", "engine"},
    "evaluation": {"files", "engine", "data", "samples", "nets", "training"},
}
"""Room -> rooms that its files may import when they are loaded; each may import its own and the files directly in the library."""


def imported_modules(path: Path, *, file_scope_only: bool = False, types_too: bool = True) -> set[str]:
    """Dotted names of the modules that a file imports, at any depth of its code or only when it is loaded."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) for inner in ast.walk(node)}
    for node in tree.body if file_scope_only else ast.walk(tree):
        if not types_too and id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            if node.module == "NMSWSegment" or node.module.startswith("NMSWSegment."):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    """Dotted name of a library file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(path: Path) -> str:
    """Folder of a library file, empty for the files directly in the library."""
    parent = path.relative_to(LIBRARY).parent.as_posix()
    return "" if parent == "." else parent


def rooms_of(modules: set[str]) -> set[str]:
    """Rooms of the library that modules lie in."""
    parts = [name.split(".") for name in modules]
    return {part[1] if part[1] in ROOMS else "" for part in parts if part[0] == "NMSWSegment" and len(part) > 1}


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
    versions = [
        re.search(r'^__version__ = "(.+?)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE).group(1) for path in (MODULE_FILE, LIBRARY / "__init__.py")
    ]
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
    at_load = imported_modules(path, file_scope_only=True)
    assert rooms_of(at_load) <= ROOMS[room_of(path)] | {room_of(path), ""}


@pytest.mark.parametrize("path", LIBRARY_FILES, ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_rooms_import_only_the_packages_that_they_may_need(path):
    packages = packages_of(imported_modules(path))
    if room_of(path) != "panel":
        assert not packages & APPLICATION_PACKAGES
    if room_of(path) in ("", "files", "panel"):
        assert "torch" not in packages
    if room_of(path) in ("", "files", "engine", "panel"):
        assert "monai" not in packages


def drawing() -> dict[str, set[str]]:
    """Room -> its files, as docs/architecture.md draws them."""
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1].splitlines()
    room, drawn = None, {}
    for line in lines:
        if match := re.match(r"( *)(\w+)/(?: |$)", line):
            room = {0: "" if match[2] == "NMSWSegment" else None}.get(len(match[1]), match[2])
        elif (match := re.match(r" +(\w+\.py)(?: |$)", line)) and room is not None:
            drawn.setdefault(room, set()).add(match[1])
    return drawn


def test_drawing_of_the_rooms_equals_the_files_on_disk():
    on_disk = {}
    for path in LIBRARY_FILES:
        if path.name != "__init__.py" or not room_of(path):
            on_disk.setdefault(room_of(path), set()).add(path.name)
    assert drawing() == on_disk


def test_code_refers_to_every_deviation_and_to_no_other():
    listed = re.findall(r"^\| (D\d+) \|", (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert listed == [f"D{number}" for number in range(1, len(listed) + 1)]
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "NMSWSegment").rglob("*.py"))
    assert sorted(set(re.findall(r"\bD\d+\b", code))) == sorted(listed)


def test_imports_have_no_circles():
    # Also inside functions: an import that waits until it is needed hides a circle, it does not open it.
    modules = {module_name(path): path for path in LIBRARY_FILES}
    imports = {
        name: {other for other in imported_modules(path, types_too=False) & set(modules) if other not in ("NMSWSegment", name)}
        for name, path in modules.items()
    }
    while leaves := {name for name, others in imports.items() if not others & set(imports)}:
        imports = {name: others for name, others in imports.items() if name not in leaves}
    assert not imports


def test_protocol_imports_nothing_of_the_project():
    assert "NMSWSegment" not in packages_of(imported_modules(LIBRARY / "protocol.py"))


def test_module_file_imports_no_third_party_package_at_file_scope():
    packages = packages_of(imported_modules(MODULE_FILE, file_scope_only=True))
    assert packages <= APPLICATION_PACKAGES | {"NMSWSegment"} | set(sys.stdlib_module_names)


def test_panel_uses_only_widgets_of_the_ui_file():
    ui = ElementTree.parse(ROOT / "Resources" / "UI" / "NMSWSegment.ui")
    in_ui = {widget.get("name") for widget in ui.iter("widget")}
    files = (MODULE_FILE, LIBRARY / "panel" / "model_section.py")
    used = {name for path in files for name in re.findall(r"\bui\.(\w+)", path.read_text(encoding="utf-8"))} - {"connect"}
    assert used <= in_ui
    assert used


BOUND_BY_HAND = {"model", "device", "runtime", "omittedStructures"}
"""Their lists depend on the computer or on the model."""


def test_parameter_names_of_the_ui_file_are_fields_of_the_parameter_node():
    ui = ElementTree.parse(ROOT / "Resources" / "UI" / "NMSWSegment.ui")
    bound = {prop.find("string").text for prop in ui.iter("property") if prop.get("name") == "SlicerParameterName"}
    fields = {
        item.target.id
        for node in ast.parse(MODULE_FILE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "NMSWSegmentParameterNode"
        for item in node.body
        if isinstance(item, ast.AnnAssign)
    }
    assert bound == fields - BOUND_BY_HAND


def test_errors_of_the_panel_are_translated():
    for path in (MODULE_FILE, *sorted((LIBRARY / "panel").glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                assert not isinstance(node.args[0], (ast.Constant, ast.JoinedStr)), f"{path.name}:{node.lineno}: a text without _()"


def test_repository_has_a_name_that_the_extensions_index_takes():
    files = [ROOT / "CMakeLists.txt", ROOT / "README.md", ROOT / "pyproject.toml", MODULE_FILE, *(ROOT / "docs").glob("*.md")]
    names = {name for path in files for name in re.findall(r"github(?:usercontent)?\.com/NMSWSegment/(\w+)", path.read_text(encoding="utf-8"))}
    assert names == {"SlicerNMSWSegment"}
