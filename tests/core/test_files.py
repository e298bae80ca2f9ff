"""Files and folders that are whole or absent, also behind a link."""

from __future__ import annotations

import pytest

from lorakit.core.files import atomic_folder, write_atomic


@pytest.mark.parametrize("exists", [True, False], ids=["exists", "dangles"])
def test_a_linked_folder_is_replaced_where_it_is(tmp_path, exists):
    target = tmp_path / "disk" / "folder"
    target.parent.mkdir()
    if exists:
        target.mkdir()
        (target / "old").touch()
    link = tmp_path / "link"
    link.symlink_to(target)
    with atomic_folder(link) as temporary:
        (temporary / "new").touch()
    assert link.readlink() == target
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(target.parent.iterdir()) == [target]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("exists", [True, False], ids=["exists", "dangles"])
def test_a_linked_file_is_replaced_where_it_is(tmp_path, exists):
    target = tmp_path / "disk" / "file"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomic(link, b"new")
    assert link.readlink() == target
    assert target.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
