"""Where the files beside the code are found, in a checkout and after installation."""

from NMSWSegment.files import resources


def test_resources_of_a_checkout_hold_what_the_program_reads():
    folder = resources.resources_folder()
    assert folder.is_absolute()
    assert (folder / "Terminology" / "anatomy.json").is_file() and (folder / "UI" / "NMSWSegment.ui").is_file()


def test_resources_of_a_checkout_lie_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "NMSWSegment" / "files" / "resources.py"))
    (tmp_path / "NMSWSegment").mkdir()
    (tmp_path / "Resources").mkdir()
    assert resources.resources_folder() == tmp_path / "Resources"


def test_resources_of_an_installed_package_lie_inside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "NMSWSegment" / "files" / "resources.py"))
    (tmp_path / "NMSWSegment" / "Resources").mkdir(parents=True)
    (tmp_path / "Resources").mkdir()  # of some other package
    assert resources.resources_folder() == tmp_path / "NMSWSegment" / "Resources"
